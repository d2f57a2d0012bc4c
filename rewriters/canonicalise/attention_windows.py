"""Attention of rank 5 has a dimension of windows, ``[B, H, W, N, D]`` or ``[B, W, H, N, D]``.

Start at :func:`window_layout`. Windows are folded into the batch, so that later stages know attention ``[B * W, H, N, D]``
alone. The view that took heads from the channels tells which of the two dimensions holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, example_shape, int_argument, normal_dim, op_name, operand, permutation
from rewriters.graph.op_sets import KEEPS_VALUES, NORMS, PARTS, PERMUTATIONS, RESHAPES, SCALINGS
from rewriters.graph.walk import operand_chain

aten = torch.ops.aten
# They leave every entry where it is.
_IN_PLACE = KEEPS_VALUES | SCALINGS | NORMS
_PASSED = _IN_PLACE | PERMUTATIONS | PARTS | {"select", "getitem", "unsqueeze"}
# The place of a dimension that an operation behind the view added.
_ADDED = -9


@dataclass(frozen=True)
class WindowLayout:
    """The dimensions of windows and heads in operands of rank 5.

    Attributes:
        heads_dim: the dimension of heads, 1 or 2; windows have the other one.
        windows: number of windows.
    """

    heads_dim: int
    windows: int

    def fold(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """``[B, H, W, N, D]`` or ``[B, W, H, N, D]`` as ``[B * W, H, N, D]``."""
        if self.heads_dim == 1:
            node = emit(graph, aten.transpose.int, (node, 1, 2), node)
        return emit(graph, aten.flatten.using_ints, (node, 0, 1), node)

    def fold_mask(self, graph: fx.Graph, mask: fx.Node, query: fx.Node) -> fx.Node:
        """A mask that broadcasts to scores ``[B, H, W, Q, K]`` or ``[B, W, H, Q, K]`` as one of ``[B * W, H, Q, K]``.

        Args:
            graph: it gets new nodes at its insertion point.
            mask: the mask.
            query: the queries, before they were folded.
        """
        for _ in range(5 - len(example_shape(mask))):
            mask = emit(graph, aten.unsqueeze.default, (mask, 0), mask)
        if self.heads_dim == 1:
            mask = emit(graph, aten.transpose.int, (mask, 1, 2), mask)
        if example_shape(mask)[:2] != (1, 1):
            batch = emit(graph, aten.sym_size.int, (query, 0), query)
            mask = emit(graph, aten.expand.default, (mask, [batch, self.windows, -1, -1, -1]), mask)
        return emit(graph, aten.flatten.using_ints, (mask, 0, 1), mask)

    def unfold(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """The inverse of :meth:`fold`."""
        node = emit(graph, aten.unflatten.int, (node, 0, [-1, self.windows]), node)
        return emit(graph, aten.transpose.int, (node, 1, 2), node) if self.heads_dim == 1 else node


def window_layout(operands: list[fx.Node]) -> WindowLayout:
    """Find the dimensions of windows and heads in queries, keys and values of rank 5.

    Raises:
        AxisError: the graph does not tell, or the operands do not agree.
    """
    heads_dim = next((dim for n in operands if (dim := _heads_dim(n)) is not None), None)
    if heads_dim is None:
        raise AxisError("nothing tells which dimension of attention of rank 5 holds heads")
    windows = operands[0].meta["val"].shape[3 - heads_dim]
    leading = {example_shape(n)[:3] for n in operands}
    if not isinstance(windows, int) or len(leading) != 1 or any(len(example_shape(n)) != 5 for n in operands):
        raise AxisError("the operands of attention of rank 5 differ in more than their tokens")
    return WindowLayout(heads_dim, windows)


def _heads_dim(value: fx.Node) -> int | None:
    """The dimension of heads, 1 or 2, of queries, keys or values of rank 5; None where nothing tells it."""
    # Dimensions of the node that the walk has reached, by dimension of ``value``.
    places = list(range(5))
    for node in operand_chain(value, lambda n: n.op == "call_function" and op_name(n) in _PASSED):
        name = op_name(node)
        if node.op != "call_function":
            return None
        if name in RESHAPES:
            return _from_channels(node, places)
        if name in PERMUTATIONS:
            order = permutation(node, len(example_shape(node)))
            places = [p if p == _ADDED else order[p] for p in places]
        elif name == "unsqueeze":
            added = normal_dim(int_argument(node, 1, "dim"), len(example_shape(node)))
            # What was added holds no heads.
            places = [_ADDED if p in (added, _ADDED) else p - (p > added) for p in places]
        elif name in PARTS or name == "select":
            dropped = _dropped_dim(node)
            places = [p + (dropped is not None and p >= dropped) for p in places]
    return None


def _from_channels(view: fx.Node, places: list[int]) -> int | None:
    """Which of the dimensions 1 and 2 a view took from the channels, together with the last one."""
    before, after = example_shape(view.all_input_nodes[0]), example_shape(view)
    first = len(after)
    while first > 0 and math.prod(after[first:]) < before[-1]:
        first -= 1
    from_channels = [d for d in (1, 2) if places[d] >= first]
    if math.prod(after[first:]) != before[-1] or len(from_channels) != 1 or places[4] != len(after) - 1:
        return None
    return from_channels[0]


def _dropped_dim(node: fx.Node) -> int | None:
    """The dimension of its operand that a part of it lacks; None if it lacks none."""
    if op_name(node) not in ("select", "unbind"):
        return None
    return normal_dim(int_argument(node, 1, "dim", 0), len(example_shape(operand(node))))
