"""Whether a rewritten model computes what the original computes: :func:`require_agreement`, and :func:`differ_by_rounding`.

Two runs in single precision differ by rounding. Most often that is within a tolerance; deep convolutions, badly scaled weights
and rankings amplify it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from madtp.calls.compare import compare, rounds_alike
from madtp.calls.double_precision import DoublePrecision
from madtp.calls.rankings import Rankings
from madtp.errors import RewriteError

HALF = frozenset((torch.bfloat16, torch.float16))
Run = Callable[[], object]
"""Runs a model once and returns its results."""


def require_agreement(original: Run, rewritten: Run, *, values: bool = True) -> None:
    """Check that two runs agree within tolerance, at least where they rank alike what they rank.

    Args:
        original: runs the original.
        rewritten: runs the rewritten model.
        values: compare values; False compares structures and shapes only.

    Raises:
        RewriteError: they do not.
    """
    with _HalfPrecision() as half:
        expected, actual = original(), rewritten()
    try:
        compare(expected, actual, values=values, coarse=half.found)
    except RewriteError as error:
        if not values or not _agree_in_order(original, rewritten):
            raise error from None


class _HalfPrecision(TorchDispatchMode):
    """Finds out whether anything is computed in half precision, by autocast say.

    Attributes:
        found: something was.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.found = False

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        result: object = func(*args, **(kwargs or {}))
        self.found |= isinstance(result, Tensor) and result.dtype in HALF
        return result


def starting_with(result: object, run: Run) -> Run:
    """Return a run that gives a result that is known at first."""
    known = [result]
    return lambda: known.pop() if known else run()


def _agree_in_order(original: Run, rewritten: Run) -> bool:
    """Whether two runs agree if the second one ranks as the first; what is ranked has to agree, too."""
    with Rankings() as own:
        expected = original()
    if not own.found:
        return False
    with Rankings(own.found) as repeated:
        actual = rewritten()
    scores = [own.found[number].scores for number in repeated.repeated]
    try:
        compare(expected, actual)
        compare(scores, list(repeated.repeated.values()))
    except RewriteError:
        return False
    return True


def differ_by_rounding(exact: Run, original: Run, rewritten: Run) -> bool:
    """Return whether two runs in single precision are about equally near to the exact results.

    All of them rank as the original does, and what is ranked counts as results do.

    Args:
        exact: runs the original on copies in double precision.
        original: runs the original.
        rewritten: runs the rewritten model.
    """
    with Rankings() as own:
        theirs = original()
    with Rankings(own.found) as ours_repeated:
        ours = rewritten()
    with DoublePrecision(), Rankings(own.found) as true_repeated:
        truth = exact()
    numbers = ours_repeated.repeated.keys() & true_repeated.repeated.keys()
    if numbers != ours_repeated.repeated.keys():
        return False
    return rounds_alike(truth, theirs, ours) and rounds_alike(
        [true_repeated.repeated[number] for number in numbers],
        [own.found[number].scores for number in numbers],
        [ours_repeated.repeated[number] for number in numbers],
    )
