"""Masked mean pooling: ``(x * m).sum(tokens) / m.sum(tokens)`` becomes one node.

Start at :func:`canonical_pooling`. As two sums it could not be pruned: the divisor would still count every token. As one
node its weights are a side input like any other, and the mean runs over the survivors.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from madtp.tokens.state import masked_mean
from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, example_shape, is_tensor, normal_dim, op_name

SAME_VALUES = frozenset("unsqueeze to _to_copy type_as expand expand_as float".split())


def canonical_pooling(graph: fx.Graph) -> None:
    """Replace every masked mean in place; other divisions stay as they are."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in ("div", "true_divide") or node.kwargs:
            continue
        try:
            _replace(graph, node)
        except AxisError:
            continue


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    total, divisor = node.args[:2]
    summed = _sum(total)
    counted, minimum = _clamped(divisor)
    weight_sum = _sum(counted)
    if summed is None or weight_sum is None or op_name(summed[0]) != "mul":
        return
    product, dim, keepdim = summed
    operands: tuple[Any, ...] = product.args[:2]
    for values, weights in (operands, operands[::-1]):
        if not (is_tensor(values) and is_tensor(weights)) or not _same_values(weights, weight_sum[0]):
            continue
        shape = example_shape(values)
        if example_shape(product) != shape or len(example_shape(weights)) != len(shape):
            continue
        if example_shape(weights)[dim] != shape[dim] or example_shape(weight_sum[0])[weight_sum[1]] != shape[dim]:
            continue
        with graph.inserting_before(node):
            new = emit(graph, masked_mean, (values, weights, dim, keepdim, minimum), node)
        if example_shape(new) != example_shape(node):
            graph.erase_node(new)
            return
        node.replace_all_uses_with(new)
        return


def _sum(node: Any) -> tuple[fx.Node, int, bool] | None:
    """Operand, dimension and keepdim of a sum over one dimension."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or op_name(node) != "sum" or len(node.args) < 2:
        return None
    operand: Any = node.args[0]
    dims: Any = node.args[1]
    dims = [dims] if isinstance(dims, int) else dims
    if not is_tensor(operand) or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    keepdim = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    return operand, normal_dim(dims[0], len(example_shape(operand))), keepdim


def _clamped(node: Any) -> tuple[Any, float | None]:
    """The operand of a clamp from below, and its bound."""
    if isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in ("clamp", "clamp_min"):
        bound = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        if isinstance(bound, (int, float)) and len(node.args) < 3 and node.kwargs.get("max") is None:
            return node.args[0], float(bound)
    return node, None


def _same_values(weights: fx.Node, counted: fx.Node) -> bool:
    """Whether ``weights`` is ``counted`` up to dtype and dimensions of size 1."""
    node: Any = weights
    while isinstance(node, fx.Node):
        if node is counted:
            return True
        if node.op != "call_function" or op_name(node) not in SAME_VALUES:
            return False
        node = node.args[0]
    return False
