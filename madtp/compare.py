"""Compare what two models return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.errors import RewriteError

RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 5e-2


def compare(expected: Any, actual: Any, *, values: bool = True) -> None:
    """Raise :class:`RewriteError` unless two output structures agree: to float tolerance, or only in their shapes."""
    first, _ = pytree.tree_flatten(expected)
    second, _ = pytree.tree_flatten(actual)
    if len(first) != len(second) or type(expected) is not type(actual):
        raise RewriteError(
            f"the rewritten model returns {type(actual).__name__} with {len(second)} tensors, the original "
            f"{type(expected).__name__} with {len(first)}."
        )
    for position, (want, have) in enumerate(zip(first, second, strict=True)):
        if not isinstance(want, Tensor):
            continue
        if want.shape != have.shape:
            raise RewriteError(f"output {position} has shape {tuple(have.shape)} instead of {tuple(want.shape)}.")
        if not values:
            continue
        if not want.dtype.is_floating_point:
            if not torch.equal(want, have):
                raise RewriteError(f"output {position} differs from the original's.")
            continue
        scale = (
            want.detach().float().abs().nan_to_num(0, 0, 0).amax().clamp(min=1e-6) if want.numel() else torch.ones(())
        )
        error = ((want.float() - have.float()).abs() / scale).nan_to_num(0).amax() if want.numel() else torch.zeros(())
        if float(error) > RELATIVE.get(want.dtype, COARSE):
            raise RewriteError(
                f"with pruning off, output {position} differs from the original's by {float(error):.1e} of its scale. The "
                "rewritten graph would be wrong, so it is refused; please report the model."
            )
