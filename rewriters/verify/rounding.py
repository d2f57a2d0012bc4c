"""Tell rounding from a fault: a graph that is wrong is wrong in any precision.

Start at :func:`is_rounding`. Deep convolutions or badly scaled weights may round by more than any tolerance for single
precision; then no other order of summation agrees with the model any better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from madtp.calls.compare import rounds_alike
from rewriters.verify.checks import Case, is_cheap, unpruned, verify


def is_rounding(case: Case, doubled: Callable[[], Case]) -> bool:
    """Whether a case that failed a check failed by rounding.

    It did if it passes all checks in double precision, and if the program, with pruning off, is about as near to the exact
    result in single precision as the model is.

    Args:
        case: The case that failed.
        doubled: Makes the case of copies in double precision.
    """
    if not is_cheap(case) or any(x.dtype == torch.float64 for x in case.call.tensors()):
        return False
    try:
        exact = doubled()
        verify(exact)
        truth, _ = unpruned(exact, exact.call)
        return rounds_alike(truth, *unpruned(case, case.call))
    except Exception:  # a fault; or a model that needs single precision somewhere, of which nothing is known then
        return False
