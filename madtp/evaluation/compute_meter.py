"""What a pruned model computes while it is evaluated: :class:`ComputeMeter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypedDict

from torch import Tensor, nn

from madtp.pruned import PrunedModel
from madtp.sites.forward_record import ForwardRecord
from madtp.tuning.calibration import dense_macs

_DENSE_MACS: ContextVar[float | None] = ContextVar("dense MACs of a sample", default=None)
_METER: ContextVar[ComputeMeter | None] = ContextVar("meter that is watching", default=None)
_APART: ContextVar[list[CallRecord] | None] = ContextVar("records that are kept apart", default=None)


class CallRecord(TypedDict):
    """One call of a pruned model, in JSON values.

    Attributes:
        samples: number of samples.
        macs: multiply-accumulates of all samples together.
        dense_macs: the same without pruning.
        tokens: tokens kept by site and sample; a list for a sample of several images.
    """

    samples: int
    macs: float
    dense_macs: float
    tokens: dict[str, list[int] | list[list[int]]]


@contextmanager
def override_dense_macs(macs: float | None) -> Iterator[None]:
    """Set the dense MACs of a sample for the calls inside the block.

    Otherwise they are those of the call with all tokens that it is given. A dense model may be given more, such as all tokens
    of an image of which a call gets the survivors. ``None`` changes nothing.
    """
    token = _DENSE_MACS.set(macs)
    try:
        yield
    finally:
        _DENSE_MACS.reset(token)


@contextmanager
def record_apart() -> Iterator[list[CallRecord]]:
    """Put the records of the calls inside the block into a list, and not into the meter; :func:`count_calls` adds them later.

    For work that serves several batches: which of them counts it must not depend on the order in which they run.
    """
    records: list[CallRecord] = []
    token = _APART.set(records)
    try:
        yield records
    finally:
        _APART.reset(token)


def count_calls(records: Sequence[CallRecord]) -> None:
    """Add records to the meter that is watching, if there is one."""
    meter = _METER.get()
    if meter is not None:
        meter.calls += records


class ComputeMeter:
    """Records MACs, with and without pruning, and the tokens kept in each call of a pruned model.

    Attributes:
        calls: one record for each call. It stays empty for a model that is not pruned.
    """

    def __init__(self) -> None:
        self.calls: list[CallRecord] = []
        self._latest: tuple[ForwardRecord, int] | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[ComputeMeter]:
        """Record the calls inside the block."""
        handle = model.register_forward_hook(self._record, with_kwargs=True) if isinstance(model, PrunedModel) else None
        token = _METER.set(self)
        try:
            yield self
        finally:
            _METER.reset(token)
            if handle is not None:
                handle.remove()

    def _record(
        self, model: PrunedModel, args: tuple[object, ...], kwargs: Mapping[str, object], output: object
    ) -> None:
        del output
        record = model.madtp.control.last_record()
        before, self._latest = self._latest, (record, len(record.runs))
        if before is not None and before[0] is record and before[1] == len(record.runs):
            return  # a step of a text, which prunes nothing: what is on record is the prompt
        samples = next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim())
        dense = _DENSE_MACS.get()
        apart = _APART.get()
        (self.calls if apart is None else apart).append(
            {
                "samples": samples,
                "macs": model.madtp.macs() * samples,
                "dense_macs": (dense_macs(model) if dense is None else dense) * samples,
                "tokens": {
                    site: _counts_by_sample(model, counts, samples)
                    for site, counts in model.madtp.token_counts().items()
                },
            }
        )


def _counts_by_sample(model: PrunedModel, counts: Tensor, samples: int) -> list[int] | list[list[int]]:
    """Token counts ``[B]`` as a list with one entry for each sample, which is a list where a sample has several images."""
    images = len(counts) // samples
    if images <= 1 or len(counts) % samples:
        single: list[int] = counts.tolist()
        return single
    blocked = model.madtp.alignment_spec.image_order == "blocked"
    several: list[list[int]] = (counts.view(images, samples).T if blocked else counts.view(samples, images)).tolist()
    return several
