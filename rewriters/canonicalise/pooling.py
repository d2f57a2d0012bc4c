"""Masked mean pooling: ``(x * m).sum(tokens) / m.sum(tokens)`` becomes one node.

Start at :func:`canonical_pooling`. As two sums it could not be pruned: the divisor would still count every token. As one node
its weights are a side input like any other, and the mean runs over the survivors.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.node import Argument

from madtp.tokens.state import masked_mean
from rewriters.graph.emit import emit
from rewriters.graph.match import NoMatch, attempt
from rewriters.graph.nodes import call_argument, example_shape, is_tensor, normal_dim, op_name
from rewriters.graph.op_sets import SAME_VALUES
from rewriters.graph.walk import operand_chain

MASKED_MEAN = "a masked mean (x * m).sum(d) / m.sum(d), the divisor clamped from below or not"
# The same values for every channel, up to type and dimensions of size 1.
_REPEATED = SAME_VALUES | {"unsqueeze", "expand", "expand_as"}


def canonical_pooling(graph: fx.Graph) -> None:
    """Replace every masked mean in place; other divisions stay as they are."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in ("div", "true_divide") or node.kwargs:
            continue
        total, (counted, minimum) = _sum(node.args[0]), _clamped(node.args[1])
        weight_sum = _sum(counted)
        if total is not None and weight_sum is not None:
            # What is refused for a mean that does not fit is its sum.
            with attempt(total.node, MASKED_MEAN):
                _replace(graph, node, _MaskedMean(total, weight_sum, minimum))


@dataclass(frozen=True)
class _Sum:
    """A sum over one dimension."""

    node: fx.Node
    values: fx.Node
    dim: int
    keepdim: bool


@dataclass(frozen=True)
class _MaskedMean:
    """What may be a masked mean: a sum, the sum that divides it, and the least value of the latter."""

    total: _Sum
    weight_sum: _Sum
    minimum: float | None


def _replace(graph: fx.Graph, node: fx.Node, mean: _MaskedMean) -> None:
    """Replace the division ``node``; raises :class:`NoMatch` if it is no mean."""
    product, weight_sum, dim = mean.total.values, mean.weight_sum, mean.total.dim
    if op_name(product) != "mul":
        raise NoMatch(mean.total.node, "what is summed is not multiplied by the weights", MASKED_MEAN)
    for values, weights in (product.args[:2], product.args[1::-1]):
        if not (is_tensor(values) and is_tensor(weights)) or not _repeats(weights, weight_sum.values):
            continue
        shape = example_shape(values)
        if example_shape(product) != shape or len(example_shape(weights)) != len(shape):
            continue
        if example_shape(weights)[dim] != shape[dim] or example_shape(weight_sum.values)[weight_sum.dim] != shape[dim]:
            continue
        with graph.inserting_before(node):
            new = emit(graph, masked_mean, (values, weights, dim, mean.total.keepdim, mean.minimum), node)
        if example_shape(new) != example_shape(node):
            graph.erase_node(new)
            raise NoMatch(node, "both sums do not keep the same dimensions", MASKED_MEAN)
        node.replace_all_uses_with(new)
        return
    raise NoMatch(mean.total.node, "the sum that divides is not that of its weights, over its tokens", MASKED_MEAN)


def _sum(node: Argument) -> _Sum | None:
    """``node`` as a sum over one dimension; None if it is anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or op_name(node) != "sum" or len(node.args) < 2:
        return None
    values, dims = node.args[:2]
    dims = [dims] if isinstance(dims, int) else dims
    if not is_tensor(values) or not isinstance(dims, (list, tuple)) or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    return _Sum(
        node, values, normal_dim(dims[0], len(example_shape(values))), bool(call_argument(node, 2, "keepdim", False))
    )


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
