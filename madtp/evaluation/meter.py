"""What a pruned model spends while it is evaluated: :class:`Meter`; what it is compared with: :func:`compared_with`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from madtp.pruned import PrunedModel
from madtp.tuning.calibration import dense_macs

_DENSE_MACS: ContextVar[float | None] = ContextVar("dense MACs of a sample", default=None)


@contextmanager
def compared_with(macs: float | None) -> Iterator[None]:
    """Calls inside have these dense MACs a sample, not those with all tokens that they are given: a dense model would be given
    more, such as all tokens of an image. None: theirs."""
    token = _DENSE_MACS.set(macs)
    try:
        yield
    finally:
        _DENSE_MACS.reset(token)


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
        dense = _DENSE_MACS.get()
        self.calls.append(
            {
                "samples": samples,
                "macs": model.macs() * samples,
                "dense_macs": (dense_macs(model) if dense is None else dense) * samples,
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
