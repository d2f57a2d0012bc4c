"""Shapes of norms, linear layers and views while a model is traced, found at once.

Start at :func:`quick_shapes`. Where sizes are free, torch takes such an operation apart into dozens of others to learn the
shape of its result, and caches each of them, although a model holds few operations twice: a third of the time of a rewrite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._prims_common import infer_size
from torch._subclasses.fake_impls import op_implementations_dict

aten = torch.ops.aten
# Of half precision some devices keep statistics in another type.
DTYPES = (torch.float32, torch.float64)


@contextmanager
def quick_shapes() -> Iterator[None]:
    """Derive shapes by the functions below inside the block. Whatever they do not know is left to torch."""
    results = {op: _or_else(known, decomposition_table[op]) for op, known in RESULTS.items()}
    views = {op: _view_or_else(op_implementations_dict[op]) for op in VIEWS}
    without_cache = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with _replaced(decomposition_table, results), _replaced(op_implementations_dict, views), without_cache:
        yield


@contextmanager
def _replaced(table: dict[Any, Any], entries: dict[Any, Any]) -> Iterator[None]:
    before = {op: table[op] for op in entries}
    table.update(entries)
    try:
        yield
    finally:
        table.update(before)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Empty results of ``aten.native_layer_norm``; None where its arguments are unusual."""
    parameters = [p for p in (weight, bias) if p is not None]
    kept = x.dim() - len(shape)
    sizes = [tuple(x.shape[kept:]), *(tuple(p.shape) for p in parameters)]
    if not shape or not all(_are_known(s) and s == tuple(shape) for s in sizes) or not _alike([x, *parameters]):
        return None
    rows = [*x.shape[:kept], *[1] * len(shape)]
    return x.new_empty(x.shape), x.new_empty(rows), x.new_empty(rows)


def addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """An empty result of ``aten.addmm``; None where its arguments are unusual."""
    if (bias.dim(), x.dim(), weight.dim()) != (1, 2, 2) or not _alike([bias, x, weight]):
        return None
    width = x.shape[1]
    known = _are_known((width, *weight.shape, *bias.shape))
    if not known or tuple(weight.shape) != (width, bias.shape[0]):
        return None
    return x.new_empty([x.shape[0], bias.shape[0]])


def view(x: Tensor, sizes: Sequence[Any]) -> Tensor | None:
    """``x.view(sizes)``; None unless ``x`` is plainly contiguous and the sizes plainly fit."""
    before, after = [_expression(n) for n in x.shape], [_expression(n) for n in sizes]
    if not before or not after or any(n in (None, 0) for n in (*before, *after)):
        return None
    if [_expression(n) for n in x.stride()] != _strides(before):
        return None
    if -1 in after:
        sizes = infer_size(list(sizes), x.numel())
        after = [_expression(n) for n in sizes]
    if math.prod(before) != math.prod(after):
        return None
    return torch.as_strided(x, sizes, _strides(sizes))


RESULTS: dict[Any, Callable[..., Any]] = {aten.native_layer_norm.default: layer_norm, aten.addmm.default: addmm}
VIEWS = (aten.view.default, aten._unsafe_view.default)


def _or_else(known: Callable[..., Any], usual: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition by ``known``, or the usual one. It bears the name of that: torch asks for it, and remembers."""

    @functools.wraps(usual)
    def decomposition(*args: Any, **kwargs: Any) -> Any:
        found = None if kwargs else known(*args)
        return usual(*args, **kwargs) if found is None else found

    return decomposition


def _view_or_else(usual: Callable[..., Any]) -> Callable[..., Any]:
    def implementation(mode: Any, op: Any, x: Tensor, *shape: Any, **kwargs: Any) -> Any:
        found = None
        if not kwargs and len(shape) == 1 and isinstance(shape[0], (list, tuple)):
            with mode:
                found = view(x, shape[0])
        return usual(mode, op, x, *shape, **kwargs) if found is None else found

    return implementation


def _are_known(sizes: Sequence[Any]) -> bool:
    return all(type(n) is int for n in sizes)


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({(x.dtype, x.device) for x in tensors}) == 1 and tensors[0].dtype in DTYPES


def _expression(size: Any) -> Any:
    """What a size is in the symbols of the capture; None where it depends on data."""
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.expr if size.node.has_hint() else None


def _strides(sizes: Sequence[Any]) -> list[Any]:
    """The strides of a contiguous tensor."""
    strides: list[Any] = [1]
    for n in reversed(sizes[1:]):
        strides.insert(0, strides[0] * n)
    return strides
