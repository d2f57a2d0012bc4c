"""Sums of stacked tensors, ``stack([x, f(x)]).sum(0)``, become additions, as a residual connection is spelled elsewhere.

Start at :func:`plain_sums`. A mean is such a sum, divided by the number of tensors.
"""

from __future__ import annotations

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.match import NoMatch, attempt
from rewriters.graph.nodes import call_argument, example_shape, is_tensor, normal_dim, op_name

aten = torch.ops.aten
OVER_THE_STACK = "a sum or a mean over the dimension along which tensors were stacked, and no other"


def plain_sums(graph: fx.Graph) -> None:
    """Replace, in place, every sum or mean over the dimension along which its operand was stacked."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in ("sum", "mean"):
            stack = node.args[0]
            if is_tensor(stack) and op_name(stack) == "stack":
                with attempt(node, OVER_THE_STACK):
                    _replace(graph, node, stack)


def _replace(graph: fx.Graph, node: fx.Node, stack: fx.Node) -> None:
    operands = call_argument(stack, 0, "tensors", ())
    rank = len(example_shape(stack))
    stacked = normal_dim(call_argument(stack, 1, "dim", 0), rank)
    dims = call_argument(node, 1, "dim", None)
    dims = dims if isinstance(dims, (list, tuple)) else (dims,)
    over_stack = len(dims) == 1 and isinstance(dims[0], int) and normal_dim(dims[0], rank) == stacked
    if not over_stack or call_argument(node, 2, "keepdim", False):
        raise NoMatch(node, f"it reduces {dims} of tensors that were stacked along {stacked}", OVER_THE_STACK)
    if len({n.meta["val"].dtype for n in (*operands, node)}) != 1:
        raise NoMatch(node, "its result has another type than its operands", OVER_THE_STACK)
    with graph.inserting_before(node):
        total = operands[0]
        for value in operands[1:]:
            total = emit(graph, aten.add.Tensor, (total, value), node)
        if op_name(node) == "mean":
            total = emit(graph, aten.div.Tensor, (total, len(operands)), node)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
