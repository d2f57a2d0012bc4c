"""Tell rounding from a fault: a graph that is wrong is wrong in any precision.

Start at :func:`is_rounding`. Deep convolutions, badly scaled weights or rankings may amplify rounding beyond any tolerance for
single precision; then no other order of summation agrees with the model any better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from madtp.calls.agreement import differ_by_rounding
from madtp.calls.double_precision import DoublePrecision
from rewriters.verify.checks import Case, unpruned_runs, verify

AFFORDABLE = 1e12
"""MACs per sample up to which the model is run in double precision: minutes on a CPU, where a refusal would be for good."""


def is_rounding(case: Case, doubled: Callable[[], Case]) -> bool:
    """Whether a case that failed a check failed by rounding.

    It did if it passes all checks in double precision, and if the program, with pruning off, is about as near to the exact
    result in single precision as the model is.

    Args:
        case: The case that failed.
        doubled: Makes the case of copies in double precision.
    """
    if case.macs() >= AFFORDABLE or any(x.dtype == torch.float64 for x in case.call.tensors()):
        return False
    try:
        exact = doubled()
        with DoublePrecision():
            verify(exact)
        truth, _ = unpruned_runs(exact, exact.call)
        return differ_by_rounding(truth, *unpruned_runs(case, case.call))
    except Exception:  # a fault; or a model that cannot be run in double precision, of which nothing is known then
        return False
