"""Shares of right answers: :func:`accuracy`, :func:`accuracy_by_kind`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from madtp.errors import DataError


def accuracy(answers: Sequence[Any], truths: Sequence[Any]) -> float:
    """Share of answers that equal the truth, 0 to 1.

    Raises:
        DataError: there are none, or not as many of one as of the other.
    """
    if not answers or len(answers) != len(truths):
        raise DataError(f"{len(answers)} answers to {len(truths)} questions; as many are needed, and at least one.")
    return sum(answer == truth for answer, truth in zip(answers, truths, strict=True)) / len(answers)


def accuracy_by_kind(answers: Sequence[Any], truths: Sequence[Any], kinds: Sequence[str]) -> dict[str, float]:
    """:func:`accuracy` of each kind of question, by name."""
    groups: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for answer, truth, kind in zip(answers, truths, kinds, strict=True):
        groups[kind].append((answer, truth))
    return {kind: accuracy(*map(list, zip(*pairs, strict=True))) for kind, pairs in sorted(groups.items())}
