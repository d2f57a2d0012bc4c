"""Divide the batch of a step over processes and, within each, over micro batches: :class:`BatchShares`.

All shares have the same size, so the mean over shares of a mean over samples is the mean over the whole batch. A loss may
also divide by something other than the number of samples, and the sizes of a batch may follow from its content;
:meth:`BatchShares.equalise` makes the shares agree in both. So N processes compute what one computes on the whole batch.
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

WHOLE_STEP = -1
"""In place of the number of a share: the step itself."""


@dataclass(frozen=True)
class Share:
    """One share of a step's batch.

    Attributes:
        number: counts the shares of all processes, from 0.
        rows: positions of its samples in the whole batch.
    """

    number: int
    rows: range


@dataclass(frozen=True)
class BatchShares:
    """How the batch of a step is divided.

    Attributes:
        samples: size of the whole batch.
        processes: the processes that divide it first.
        accumulate: number of micro batches of each process.
        seed: seed of everything that is drawn at random in a step.

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
        """Number of shares over all processes."""
        return self.processes.size * self.accumulate

    def local(self) -> list[Share]:
        """Return the shares of this process."""
        size = self.samples // self.count
        first = self.processes.rank * self.accumulate
        return [
            Share(number, range(number * size, (number + 1) * size)) for number in range(first, first + self.accumulate)
        ]

    def reseed(self, step: int, share: int = WHOLE_STEP) -> None:
        """Seed torch for one share of one step.

        Random draws then depend neither on the process nor on what was drawn before.
        """
        word = hashlib.blake2b(f"{self.seed}/{step}/{share}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(word, "little") >> 1)

    def equalise(self, batches: Sequence[Batch], padding: Mapping[str, float]) -> list[dict[str, Tensor]]:
        """Make this process's batches of a step agree with those of all other shares.

        Tensors without dimensions become their mean over all shares. A share that divides a sum by one then contributes
        its part of the quotient of the whole batch.

        Args:
            batches: one batch for each local share.
            padding: names of tensors, and the value with which each is padded at the end of its last dimension, up to the
                longest of all shares.
        """
        equal = [dict(batch) for batch in batches]
        divisors = sorted(name for name, value in equal[0].items() if value.dim() == 0)
        padded = sorted(set(padding) & set(equal[0]))
        if self.count == 1 or not (divisors or padded):
            return equal
        if divisors:
            sums = torch.stack([torch.stack([batch[name].double() for name in divisors]) for batch in equal])
            means = self.processes.mean(sums.mean(dim=0))
            for batch in equal:
                batch |= {name: mean.to(batch[name].dtype) for name, mean in zip(divisors, means, strict=True)}
        if padded:
            device = equal[0][padded[0]].device
            lengths = torch.tensor([[batch[name].shape[-1] for name in padded] for batch in equal], device=device)
            longest: list[int] = self.processes.largest(lengths.amax(dim=0)).tolist()
            for batch in equal:
                for name, length in zip(padded, longest, strict=True):
                    batch[name] = F.pad(batch[name], (0, length - batch[name].shape[-1]), value=padding[name])
        return equal

    def mean(self, metrics: Sequence[Metrics], device: torch.device) -> dict[str, float | Tensor]:
        """Return the mean over all shares of the metrics of each; the metrics of a single share stay as they are."""
        if self.count == 1:
            return dict(metrics[0])
        names = sorted(metrics[0])
        rows = [
            torch.stack([torch.as_tensor(share[name], device=device).double() for name in names]) for share in metrics
        ]
        means: list[float] = self.processes.mean(torch.stack(rows).mean(dim=0)).tolist()
        by_name = dict(zip(names, means, strict=True))
        return {name: by_name[name] for name in metrics[0]}
