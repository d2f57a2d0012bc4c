"""Runs in double precision throughout: :class:`DoublePrecision`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from madtp.calls.call import Call

LESS = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""Dtypes of less precision."""


class DoublePrecision(TorchDispatchMode):
    """Operations inside the block compute and return double precision where they would be asked for less.

    The parameters of a model in double precision do not make all of it exact: models compute position codes and norms in
    single precision whatever their weights are, and a graph holds the dtypes that it was captured with.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        args, kwargs = pytree.tree_map_only(torch.dtype, _in_double, (args, kwargs or {}))
        return pytree.tree_map_only(Tensor, _widened, func(*args, **kwargs))


def in_double_precision(call: Call) -> Call:
    """Return a call with its tensors in double precision."""
    return call.with_leaves([_widened(leaf) if isinstance(leaf, Tensor) else leaf for leaf in call.flat()[0]])


def _in_double(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in LESS else dtype


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype in LESS else tensor
