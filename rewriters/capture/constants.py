"""Constant folding: results that depend only on constants of the call are computed during capture, not by the graph.

Start at :class:`FoldingConstants`. Lengths that Python reads from such values (``.tolist()``), and the tables and indices
that it makes of them, become constants of the program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

# Functions that make tensors of numbers alone.
MAKERS = frozenset({torch.arange, torch.tensor, torch.zeros, torch.ones, torch.full, torch.linspace, torch.eye})


class FoldingConstants(TorchFunctionMode):
    """While active, functions of plain tensors and numbers return plain tensors; traced tensors have other types."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        symbolic = any(isinstance(x, torch.SymInt) for x in leaves)
        if not symbolic and (all(map(_is_plain, tensors)) if tensors else func in MAKERS):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if func is Tensor.__getitem__:
            args = (args[0], _by_number(args[1]))
        return func(*args, **kwargs)


def _by_number(index: Any) -> Any:
    """An index in which each mask of known values is replaced by the positions that it selects."""
    parts: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, Tensor) and _is_plain(part) and part.dtype == torch.bool:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                parts += part.nonzero(as_tuple=True)
        else:
            parts.append(part)
    return tuple(parts)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not torch._is_functional_tensor(tensor)
