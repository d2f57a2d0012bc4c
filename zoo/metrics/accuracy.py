"""Fractions of right answers: :func:`accuracy`, :func:`accuracy_by_kind`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from madtp.errors import DataError


def accuracy(answers: Sequence[object], truths: Sequence[object]) -> float:
    """Return the fraction of answers that equal the truth.

    Args:
        answers: One for each sample, of any type that compares.
        truths: As many.

    Raises:
        DataError: There are no answers, or there is not one for each truth.
    """
    if not answers or len(answers) != len(truths):
        raise DataError(f"{len(answers)} answers to {len(truths)} questions; as many are needed, and at least one.")
    return sum(bool(answer == truth) for answer, truth in zip(answers, truths, strict=True)) / len(answers)


def accuracy_by_kind(answers: Sequence[object], truths: Sequence[object], kinds: Sequence[str]) -> dict[str, float]:
    """Return the :func:`accuracy` of each kind of question, by its name in alphabetical order.

    Args:
        answers: One for each sample.
        truths: As many.
        kinds: The kind of each sample, as many.
    """
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for answer, truth, kind in zip(answers, truths, kinds, strict=True):
        groups[kind].append(bool(answer == truth))
    return {kind: sum(right) / len(right) for kind, right in sorted(groups.items())}
