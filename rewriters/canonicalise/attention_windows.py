"""Attention of rank 5: windows stand beside heads, ``[B, H, W, N, D]`` or ``[B, W, H, N, D]``.

Start at :func:`windows_beside`. Windows are folded into the batch, so that later stages know attention ``[B * W, H, N, D]``
alone. Which of the two dimensions holds heads is told by the view that took them from the channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, call_argument, example_shape, is_tensor, normal_dim, op_name

aten = torch.ops.aten
SAME = frozenset("to _to_copy type_as contiguous clone alias detach mul div dropout layer_norm rms_norm".split())
REGROUPED = frozenset(("view", "reshape", "_unsafe_view", "unflatten"))
TURNED = frozenset(("permute", "transpose"))
PARTS = frozenset("unbind chunk split split_with_sizes".split())


def heads_beside(operand: fx.Node) -> int | None:
    """The dimension of heads, 1 or 2, of queries, keys or values of rank 5; None where nothing tells it."""
    node: Any = operand
    places = list(range(5))
    while is_tensor(node) and node.op == "call_function":
        name = op_name(node)
        if name in REGROUPED:
            return _told(node, places)
        if name in TURNED:
            order = _order(node)
            places = [order[p] for p in places]
        elif name == "select" or name == "getitem":
            source: Any = node if name == "select" else node.args[0]
            if name == "getitem" and op_name(source) not in PARTS:
                return None
            gone = _part(source, name)
            places = [p + (gone is not None and p >= gone) for p in places]
            node = source
        elif name not in SAME:
            return None
        node = node.args[0]
    return None


def _told(view: fx.Node, places: list[int]) -> int | None:
    """Which of the dimensions 1 and 2 a view took from the channels, with the last one."""
    before, after = example_shape(view.all_input_nodes[0]), example_shape(view)
    first = len(after)
    while first > 0 and math.prod(after[first:]) < before[-1]:
        first -= 1
    from_channels = [d for d in (1, 2) if places[d] >= first]
    if math.prod(after[first:]) != before[-1] or len(from_channels) != 1 or places[4] != len(after) - 1:
        return None
    return from_channels[0]


def _order(node: fx.Node) -> list[int]:
    rank = len(example_shape(node))
    if op_name(node) == "permute":
        return [normal_dim(d, rank) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(rank))
    first, second = (normal_dim(d, rank) for d in node.args[1:3])  # type: ignore[arg-type]
    order[first], order[second] = second, first
    return order


def _part(source: fx.Node, name: str) -> int | None:
    """The dimension that a part of ``source`` lacks; None if it lacks none."""
    rank = len(example_shape(source.args[0]))  # type: ignore[arg-type]
    if name == "select" or op_name(source) == "unbind":
        return normal_dim(call_argument(source, 1, "dim", 0), rank)
    return None


def fold_windows(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """``[B, H, W, N, D]`` as ``[B * W, H, N, D]``; ``heads``: the dimension of H."""
    if heads == 1:
        node = emit(graph, aten.transpose.int, (node, 1, 2), node)
    return emit(graph, aten.flatten.using_ints, (node, 0, 1), node)


def unfold_windows(graph: fx.Graph, node: fx.Node, windows: int, heads: int) -> fx.Node:
    """``[B * W, H, N, D]`` as ``[B, H, W, N, D]``."""
    node = emit(graph, aten.unflatten.int, (node, 0, [-1, windows]), node)
    return emit(graph, aten.transpose.int, (node, 1, 2), node) if heads == 1 else node


def windows_beside(operands: list[fx.Node]) -> tuple[int, int]:
    """The dimension of heads, and the number of windows, of queries, keys and values of rank 5.

    Raises :class:`AxisError` where they are no such operands.
    """
    heads = next((told for n in operands if (told := heads_beside(n)) is not None), None)
    if heads is None:
        raise AxisError("it is not told which dimension of attention of rank 5 holds heads")
    windows = operands[0].meta["val"].shape[3 - heads]
    leading = {example_shape(n)[:3] for n in operands}
    if not isinstance(windows, int) or len(leading) != 1 or any(len(example_shape(n)) != 5 for n in operands):
        raise AxisError("attention of rank 5 whose operands differ in more than their tokens")
    return heads, windows
