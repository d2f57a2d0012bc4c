"""Tensors that are made empty and filled range by range, as keys of a turned and an unturned part: concatenations.

Start at :func:`filled_to_cat`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriters.graph.nodes import call_argument, is_tensor, known_size, normal_dim, op_name

MAKERS = frozenset(
    "empty zeros ones full new_empty new_zeros new_ones new_full empty_like zeros_like ones_like".split()
)

Range = tuple[int, int, fx.Node]


def filled_to_cat(graph: fx.Graph) -> None:
    """Ranges of one dimension that are written into a new tensor, and are all of it, become a concatenation."""
    for node in list(graph.nodes):
        if not _is_write(node) or any(_is_write(user) and user.args[0] is node for user in node.users):
            continue
        found = _ranges(node)
        if found is None:
            continue
        dim, ranges = found
        with graph.inserting_before(node):
            joined = graph.call_function(torch.ops.aten.cat.default, ([part for _, _, part in ranges], dim))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def _is_write(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) == "slice_scatter"


def _ranges(last: fx.Node) -> tuple[int, list[Range]] | None:
    """The dimension and the ranges that a chain of writes fills, in order; None if something is left, or written twice."""
    node: Any = last
    dims: set[int] = set()
    ranges: list[Range] = []
    while is_tensor(node) and _is_write(node):
        value = node.meta["val"]
        dim = normal_dim(call_argument(node, 2, "dim", 0), value.dim())
        size, start, end = value.shape[dim], call_argument(node, 3, "start", None), call_argument(node, 4, "end", None)
        known = isinstance(size, int) and all(n is None or isinstance(n, int) for n in (start, end))
        part = _written(node.args[1])
        if not known or call_argument(node, 5, "step", 1) != 1 or part.meta["val"].dtype != value.dtype:
            return None
        start, end, _ = slice(start, end).indices(size)
        dims.add(dim)
        ranges.append((start, end, part))
        node = node.args[0]
    if len(dims) != 1 or not is_tensor(node) or op_name(node) not in MAKERS:
        return None
    ranges.sort(key=lambda one: one[:2])
    borders = [0, *(end for _, end, _ in ranges)]
    whole = borders[-1] == last.meta["val"].shape[next(iter(dims))]
    if not whole or [start for start, _, _ in ranges] != borders[:-1]:
        return None
    return dims.pop(), ranges


def _written(part: Any) -> Any:
    """What is written, without an expansion to the shape that it has: the range that it follows has no tokens of its own."""
    before = part.args[0] if op_name(part) == "expand_as" else None
    return before if isinstance(before, fx.Node) and _sizes(before) == _sizes(part) else part


def _sizes(node: fx.Node) -> list[object]:
    return list(map(known_size, node.meta["val"].shape))
