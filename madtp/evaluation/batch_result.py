"""What a stage gives for one batch, and how it is stored: :class:`BatchResult`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from madtp.errors import CheckpointError
from madtp.evaluation.compute_meter import CallRecord
from madtp.evaluation.partial_results import AGAIN
from madtp.evaluation.task import Result
from madtp.files.limits import ExceededError, finite


@dataclass(frozen=True)
class BatchResult:
    """What a stage gives for one batch; its fields are those of the stored JSON.

    Attributes:
        ids: names of the samples.
        results: a result for each.
        calls: what the calls of a pruned model computed.
        seconds: how long they took.
    """

    ids: list[str]
    results: list[Result]
    calls: list[CallRecord]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], ids: Sequence[str], path: Path) -> BatchResult:
        """Return what was stored.

        Args:
            content: the fields.
            ids: names of the samples of the batch.
            path: the file they were read from, for messages.

        Raises:
            CheckpointError: they belong to other samples, or are no results.
        """
        fields: list[Any] = [content.get(name) for name in ("ids", "results", "calls", "seconds")]
        stored_ids, results, calls, seconds = fields
        if stored_ids != list(ids):
            raise CheckpointError(f"{path} holds results of other samples than those of its batch; {AGAIN}.")
        if (
            not isinstance(results, list)
            or len(results) != len(ids)
            or not all(isinstance(result, dict) for result in results)
            or not isinstance(calls, list)
            or not all(_is_call(call, len(ids)) for call in calls)
            or not _is_number(seconds)
        ):
            raise CheckpointError(f"{path} does not hold the results of a batch; {AGAIN}.")
        return cls(list(ids), results, calls, float(seconds))


def _is_call(call: object, samples: int) -> bool:
    """Whether a JSON value is a :class:`CallRecord`, and has token counts for each sample of a whole batch."""
    if not isinstance(call, dict) or set(call) != set(CallRecord.__annotations__):
        return False
    if not all(_is_number(call[name]) for name in ("samples", "macs", "dense_macs")):
        return False
    tokens, least = call["tokens"], samples if call["samples"] == samples else 0
    return isinstance(tokens, dict) and all(isinstance(x, list) and len(x) >= least for x in tokens.values())


def _is_number(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    try:
        return finite(value, "it") >= 0
    except ExceededError:
        return False
