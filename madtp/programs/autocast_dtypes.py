"""Dtypes of outputs under autocast: :func:`as_under_autocast`.

Autocast decides by the functions that a model calls, and a graph calls others: what torch's composite functions are made of.
So under autocast, outputs get the dtypes that the original's have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.saved_tensors import without_saved_tensors_hooks

Dtypes: TypeAlias = tuple[torch.dtype | None, ...]
KnownDtypes: TypeAlias = dict[tuple[torch.dtype, bool], Dtypes]


def as_under_autocast(
    result: object, leaves: Sequence[object], known: KnownDtypes, original: Callable[[], object]
) -> object:
    """Return what a program returned in the dtypes of what the original returns; outside autocast, as it is.

    Args:
        result: what the program returned.
        leaves: the inputs of the call.
        known: the original's dtypes by type of autocast and whether gradients are on, as torch's own layers take other ways
            then; filled at the first call of each kind.
        original: runs the original on the call.
    """
    active = autocast_of(leaves)
    if active is None:
        return result
    kind = (active, torch.is_grad_enabled())
    if kind not in known:
        with without_saved_tensors_hooks():
            known[kind] = tuple(map(_dtype, pytree.tree_leaves(original())))
    found, spec = pytree.tree_flatten(result)
    wanted = known[kind]
    if len(found) != len(wanted):
        return result
    cast = [
        x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x
        for x, dtype in zip(found, wanted, strict=True)
    ]
    return pytree.tree_unflatten(cast, spec)


def autocast_of(leaves: Sequence[object]) -> torch.dtype | None:
    """Return the dtype of the autocast that a call runs under; None if there is none."""
    device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _dtype(output: object) -> torch.dtype | None:
    return output.dtype if isinstance(output, Tensor) and output.is_floating_point() else None
