"""Masked mean pooling: ``(x * m).sum(tokens) / m.sum(tokens)`` becomes one node.

Start at :func:`canonical_pooling`. As two sums it could not be pruned: the divisor would still count every token. As one node
its weights are a side input like any other, and the mean runs over the survivors.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from torch import fx
from torch.fx.node import Argument

from madtp.tokens.state import masked_mean
from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, call_argument, example_shape, is_tensor, normal_dim, op_name
from rewriters.graph.op_sets import SAME_VALUES
from rewriters.graph.walk import operand_chain

# The same values for every channel, up to type and dimensions of size 1.
_REPEATED = SAME_VALUES | {"unsqueeze", "expand", "expand_as"}


def canonical_pooling(graph: fx.Graph) -> None:
    """Replace every masked mean in place; other divisions stay as they are."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in ("div", "true_divide") and not node.kwargs:
            with suppress(AxisError):
                _replace(graph, node)


@dataclass(frozen=True)
class _Sum:
    """A sum over one dimension."""

    values: fx.Node
    dim: int
    keepdim: bool


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    total, divisor = node.args[:2]
    summed = _sum(total)
    counted, minimum = _clamped(divisor)
    weight_sum = _sum(counted)
    if summed is None or weight_sum is None or op_name(summed.values) != "mul":
        return
    product, dim = summed.values, summed.dim
    for values, weights in (product.args[:2], product.args[1::-1]):
        if not (is_tensor(values) and is_tensor(weights)) or not _repeats(weights, weight_sum.values):
            continue
        shape = example_shape(values)
        if example_shape(product) != shape or len(example_shape(weights)) != len(shape):
            continue
        if example_shape(weights)[dim] != shape[dim] or example_shape(weight_sum.values)[weight_sum.dim] != shape[dim]:
            continue
        with graph.inserting_before(node):
            new = emit(graph, masked_mean, (values, weights, dim, summed.keepdim, minimum), node)
        if example_shape(new) != example_shape(node):
            graph.erase_node(new)
            return
        node.replace_all_uses_with(new)
        return


def _sum(node: Argument) -> _Sum | None:
    """``node`` as a sum over one dimension; None if it is anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or op_name(node) != "sum" or len(node.args) < 2:
        return None
    values, dims = node.args[:2]
    dims = [dims] if isinstance(dims, int) else dims
    if not is_tensor(values) or not isinstance(dims, (list, tuple)) or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    return _Sum(values, normal_dim(dims[0], len(example_shape(values))), bool(call_argument(node, 2, "keepdim", False)))


def _clamped(node: Argument) -> tuple[Argument, float | None]:
    """The operand of a clamp from below, and its bound; ``node`` and None if it is anything else."""
    if isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in ("clamp", "clamp_min"):
        bound = call_argument(node, 1, "min", None)
        if isinstance(bound, (int, float)) and call_argument(node, 2, "max", None) is None:
            return node.args[0], float(bound)
    return node, None


def _repeats(weights: fx.Node, counted: fx.Node) -> bool:
    """Whether ``weights`` is ``counted`` up to type and dimensions of size 1."""
    chain = operand_chain(weights, lambda n: n.op == "call_function" and op_name(n) in _REPEATED)
    return any(node is counted for node in chain)
