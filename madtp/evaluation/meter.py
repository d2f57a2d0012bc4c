"""What a pruned model spends while it is evaluated: :class:`Meter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from madtp.pruned import PrunedModel


class Meter:
    """Records, for each call of a pruned model, MACs with and without pruning, and tokens kept; nothing of other models.

    Attributes:
        calls: one record a call, in JSON values: `samples`, `macs` and `dense_macs` of all of them together, and `tokens`,
            {site: counts}.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Meter]:
        """Record the calls inside the block."""
        handle = model.register_forward_hook(self._record, with_kwargs=True) if isinstance(model, PrunedModel) else None
        try:
            yield self
        finally:
            if handle is not None:
                handle.remove()

    def _record(self, model: PrunedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        del output
        samples = next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim())
        self.calls.append(
            {
                "samples": samples,
                "macs": model.macs() * samples,
                "dense_macs": sum(model.macs_by_module("all").values()) * samples,
                "tokens": {site: _by_sample(model, counts, samples) for site, counts in model.token_counts().items()},
            }
        )


def _by_sample(model: PrunedModel, counts: Tensor, samples: int) -> list[Any]:
    """Counts [B], or of several images a sample, as a list with an entry a sample."""
    images = len(counts) // samples
    if images <= 1 or len(counts) % samples:
        return counts.tolist()
    blocked = model._image_order == "blocked"
    return (counts.view(images, samples).T if blocked else counts.view(samples, images)).tolist()
