"""Heads that are folded into the batch, ``[B * H, N, D]``: how many there are, and how they are taken out and put back."""

from __future__ import annotations

import math

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.nodes import example_shape, op_name
from rewriters.graph.op_sets import KEEPS_VALUES, PARTS, PERMUTATIONS, RESHAPES
from rewriters.graph.walk import operand_chain

aten = torch.ops.aten
# What may stand between the view that folds heads into the batch and the product.
_PASSED = KEEPS_VALUES | PERMUTATIONS | PARTS | {"mul", "div", "getitem", "select"}


def folded_heads(query: fx.Node) -> int:
    """Heads that are folded into the batch of ``[B * H, N, D]``, read off the view that folded them; 1 if none did."""
    width = example_shape(query)[-1]
    for node in operand_chain(query, lambda n: op_name(n) in _PASSED):
        if node.op != "call_function" or op_name(node) not in RESHAPES:
            continue
        shape = example_shape(node.all_input_nodes[0])
        if len(shape) == len(example_shape(node)) + 1 and example_shape(node)[-3] == math.prod(shape[-4:-2]):
            return shape[-3]
        if len(shape) == 4:
            return shape[1]
        return max(1, shape[-1] // width)
    return 1


def unfold_heads(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """``[B * H, N, D]`` as ``[B, H, N, D]``."""
    if heads == 1:
        return emit(graph, aten.unsqueeze.default, (node, 1), node)
    return emit(graph, aten.unflatten.int, (node, 0, [-1, heads]), node)


def fold_heads(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``[B, H, N, D]`` as ``[B * H, N, D]``."""
    return emit(graph, aten.flatten.using_ints, (node, 0, 1), node)
