"""Dtypes of outputs under autocast: :class:`AutocastDtypes`.

Autocast decides by the functions that a model calls, and a graph calls others: what torch's composite functions are made of.
So under autocast, outputs get the dtypes that the original's have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Dtypes: TypeAlias = tuple[torch.dtype | None, ...]


class AutocastDtypes:
    """The dtypes of the original's outputs, by program and type of autocast. The original runs once for each."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.dtype], Dtypes] = {}

    def __call__(
        self, program: int, leaves: Sequence[object], result: object, original: Callable[[], object]
    ) -> object:
        """Give what a program returned the dtypes of what the original returns; outside autocast, as it is.

        Args:
            program: number of the program.
            leaves: the inputs of the call.
            result: what the program returned.
            original: runs the original on the call, without gradients.
        """
        active = _autocast(leaves)
        if active is None:
            return result
        if (program, active) not in self._known:
            self._known[program, active] = tuple(map(_dtype, pytree.tree_leaves(original())))
        found, spec = pytree.tree_flatten(result)
        wanted = self._known[program, active]
        if len(found) != len(wanted):
            return result
        cast = [
            x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x
            for x, dtype in zip(found, wanted, strict=True)
        ]
        return pytree.tree_unflatten(cast, spec)


def _autocast(leaves: Sequence[object]) -> torch.dtype | None:
    """The dtype of the autocast that a call runs under; None if there is none."""
    device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _dtype(output: object) -> torch.dtype | None:
    return output.dtype if isinstance(output, Tensor) and output.is_floating_point() else None
