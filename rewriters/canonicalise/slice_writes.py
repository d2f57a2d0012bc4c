"""Tensors that are made empty and filled range by range become concatenations.

Start at :func:`slice_writes_to_cat`. Keys that are rotated only in part are written this way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx
from torch.fx.node import Argument

from rewriters.graph.match import NoMatch, attempt
from rewriters.graph.nodes import call_argument, is_tensor, known_size, normal_dim, op_name, operand
from rewriters.graph.op_sets import MAKERS

FILLED = "ranges of one dimension that fill a new tensor, each entry written once"


class _Range(NamedTuple):
    """Entries from ``start`` to ``end`` of a dimension, and what is written there."""

    start: int
    end: int
    part: fx.Node


class _Filled(NamedTuple):
    """Ranges, in order, that are all of a dimension."""

    dim: int
    ranges: list[_Range]


def slice_writes_to_cat(graph: fx.Graph) -> None:
    """Replace, in place, writes of ranges that together fill a new tensor by a concatenation."""
    for node in list(graph.nodes):
        if not _is_write(node) or any(_is_write(user) and user.args[0] is node for user in node.users):
            continue
        with attempt(node, FILLED):
            _join(graph, node, _filled_by(node))


def _join(graph: fx.Graph, last: fx.Node, filled: _Filled) -> None:
    with graph.inserting_before(last):
        parts = [written.part for written in filled.ranges]
        joined = graph.call_function(torch.ops.aten.cat.default, (parts, filled.dim))
    joined.meta = dict(last.meta)
    last.replace_all_uses_with(joined)
    graph.erase_node(last)


def _is_write(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) == "slice_scatter"


def _filled_by(last: fx.Node) -> _Filled:
    """The ranges that a chain of writes fills; raises :class:`NoMatch` if something is left, or written twice."""
    node: Argument = last
    dims: set[int] = set()
    ranges: list[_Range] = []
    while is_tensor(node) and _is_write(node):
        value = node.meta["val"]
        dim = normal_dim(call_argument(node, 2, "dim", 0), value.dim())
        size, start, end = value.shape[dim], call_argument(node, 3, "start", None), call_argument(node, 4, "end", None)
        known = isinstance(size, int) and all(n is None or isinstance(n, int) for n in (start, end))
        part = _without_expansion(operand(node, 1))
        if not known or call_argument(node, 5, "step", 1) != 1:
            raise NoMatch(node, "a range is written whose place is not known, or not every entry of it", FILLED)
        if part.meta["val"].dtype != value.dtype:
            raise NoMatch(node, "values of another type are written", FILLED)
        start, end, _ = slice(start, end).indices(size)
        dims.add(dim)
        ranges.append(_Range(start, end, part))
        node = node.args[0]
    if not is_tensor(node) or op_name(node) not in MAKERS:
        raise NoMatch(last, "ranges are written to a tensor that holds values", FILLED)
    if len(dims) != 1:
        raise NoMatch(last, "ranges of several dimensions are written", FILLED)
    dim = dims.pop()
    ranges.sort(key=lambda written: written[:2])
    borders = [0, *(written.end for written in ranges)]
    whole = borders[-1] == last.meta["val"].shape[dim]
    if not whole or [written.start for written in ranges] != borders[:-1]:
        raise NoMatch(last, "the ranges that are written leave a gap or overlap", FILLED)
    return _Filled(dim, ranges)


def _without_expansion(part: fx.Node) -> fx.Node:
    """What is written, without an expansion to the shape that it has: the range that it follows has no tokens of its own."""
    before = part.args[0] if op_name(part) == "expand_as" else None
    return before if isinstance(before, fx.Node) and _sizes(before) == _sizes(part) else part


def _sizes(node: fx.Node) -> list[object]:
    return list(map(known_size, node.meta["val"].shape))
