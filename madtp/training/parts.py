"""How the batch of a step is divided over processes and, on each, over micro batches: :class:`Parts`.

All parts are of one size, so the mean over parts of a mean over samples is the mean over the whole batch. Where a loss
divides by something else than the number of samples, or where sizes of a batch come from its own content, the parts are
made alike first (:meth:`Parts.alike`); so N processes compute what one computes on the whole batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp.errors import ConfigError
from madtp.processes import Processes

Batch = Mapping[str, Tensor]
Metrics = Mapping[str, float | Tensor]

WHOLE = -1
"""In place of the number of a part: the step as such."""


@dataclass(frozen=True)
class Parts:
    """The parts of a step's batch.

    Attributes:
        samples: of the whole batch.
        processes: over which it is divided first.
        accumulate: micro batches of each process.
        seed: of everything that is drawn at random in a step.

    Raises:
        ConfigError: the samples cannot be divided evenly.
    """

    samples: int
    processes: Processes
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples % self.count:
            raise ConfigError(
                f"{self.samples} samples a step cannot be divided evenly over {self.processes.size} processes of "
                f"{self.accumulate} micro batches (training.accumulate); take a multiple of {self.count}"
            )

    @property
    def count(self) -> int:
        """Number of parts over all processes."""
        return self.processes.size * self.accumulate

    def own(self) -> list[tuple[int, range]]:
        """This process's parts: the number of each and its places in the whole batch."""
        size = self.samples // self.count
        first = self.processes.rank * self.accumulate
        return [(part, range(part * size, (part + 1) * size)) for part in range(first, first + self.accumulate)]

    def reseed(self, step: int, part: int = WHOLE) -> None:
        """Seed torch for one part of one step, so that draws depend on neither the process nor what was drawn before."""
        word = hashlib.blake2b(f"{self.seed}/{step}/{part}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(word, "little") >> 1)

    def alike(self, batches: Sequence[Batch], padding: Mapping[str, float]) -> list[dict[str, Tensor]]:
        """This process's batches of a step, made alike those of all others.

        Tensors without dimensions become their mean over all parts: a part that divides a sum by it contributes its share
        of the quotient of the whole batch. Tensors that `padding` names are padded at the end of their last dimension, with
        the value given, to the longest of all parts.
        """
        found = [dict(batch) for batch in batches]
        counts = sorted(name for name, value in found[0].items() if value.dim() == 0)
        padded = sorted(set(padding) & set(found[0]))
        if self.count == 1 or not (counts or padded):
            return found
        if counts:
            sums = torch.stack([torch.stack([batch[name].double() for name in counts]) for batch in found])
            means = self.processes.mean(sums.mean(dim=0))
            for batch in found:
                batch |= {name: mean.to(batch[name].dtype) for name, mean in zip(counts, means, strict=True)}
        if padded:
            device = found[0][padded[0]].device
            own = torch.tensor([[batch[name].shape[-1] for name in padded] for batch in found], device=device)
            longest = self.processes.largest(own.amax(dim=0)).tolist()
            for batch in found:
                for name, length in zip(padded, longest, strict=True):
                    batch[name] = F.pad(batch[name], (0, length - batch[name].shape[-1]), value=padding[name])
        return found

    def mean(self, metrics: Sequence[Metrics], device: torch.device) -> dict[str, float | Tensor]:
        """Metrics of this process's parts as means over all parts; those of a single part as they are."""
        if self.count == 1:
            return dict(metrics[0])
        names = sorted(metrics[0])
        rows = [
            torch.stack([torch.as_tensor(part[name], device=device).double() for name in names]) for part in metrics
        ]
        means = self.processes.mean(torch.stack(rows).mean(dim=0)).tolist()
        by_name = dict(zip(names, means, strict=True))
        return {name: by_name[name] for name in metrics[0]}
