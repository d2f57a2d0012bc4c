"""Softmaxes that are spelled out, ``exp(x) / exp(x).sum(-1, keepdim=True)``, and those of transposed scores.

Start at :func:`plain_softmaxes`. Scores ``keys @ queries`` whose softmax runs over dimension -2, and whose probabilities are
transposed behind it, are turned round: then the softmax runs over the last dimension, as it does elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.fx.node import Argument

from rewriters.canonicalise.attention_scores import has_scores
from rewriters.graph.emit import emit
from rewriters.graph.match import NoMatch, attempt
from rewriters.graph.nodes import call_argument, example_shape, is_tensor, normal_dim, op_name, operand, permutation
from rewriters.graph.op_sets import CASTS, FILLS, PERMUTATIONS, PRODUCTS, SAME_VALUES, SOFTMAXES
from rewriters.graph.walk import behind

aten = torch.ops.aten
EXPONENTIALS = "exponentials of scores over their own sum along one dimension"
TURNED = "scores [..., K, Q] with a softmax over dimension -2, transposed behind it"
# Steps of scores, entry by entry.
_ENTRYWISE = frozenset("add sub mul div tanh clamp".split()) | FILLS | SAME_VALUES


def plain_softmaxes(graph: fx.Graph) -> None:
    """Replace spelled-out softmaxes, then turn transposed scores round, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in ("div", "mul", "exp"):
            with attempt(node, EXPONENTIALS):
                _replace_exponentials(graph, node)
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in SOFTMAXES and node.users:
            with attempt(node, TURNED):
                _turn(graph, node)


def _replace_exponentials(graph: fx.Graph, node: fx.Node) -> None:
    if op_name(node) == "exp":
        scores, dim = _shifted_by_logsumexp(node)
    else:
        scores, dim = _divided_by_sum(node)
    if scores.meta["val"].dtype != node.meta["val"].dtype:
        raise NoMatch(node, "its result has another type than its scores", EXPONENTIALS)
    with graph.inserting_before(node):
        new = emit(graph, aten.softmax.int, (scores, dim), node)
    node.replace_all_uses_with(new)


def _divided_by_sum(node: fx.Node) -> tuple[fx.Node, int]:
    """The scores and the dimension of ``exp(scores) / sum(exp(scores))``; raises :class:`NoMatch` if it is anything else."""
    weights, total = node.args[:2]
    if op_name(node) == "mul":
        weights, total = (weights, total) if _is(total, "reciprocal") else (total, weights)
        total = operand(total) if isinstance(total, fx.Node) and _is(total, "reciprocal") else None
    expanded = behind(total, {"expand", "expand_as"})
    scores, dim = _exponentials_of(weights), _summed_dim(expanded, weights)
    if scores is None or dim is None:
        raise NoMatch(node, "it divides by something else than the sum of its numerator", EXPONENTIALS)
    return scores, dim


def _exponentials_of(value: Argument) -> fx.Node | None:
    """x of ``exp(x)``."""
    return operand(value) if isinstance(value, fx.Node) and _is(value, "exp") else None


def _summed_dim(total: Argument, weights: Argument) -> int | None:
    """The dimension that ``total`` sums ``weights``, or the same exponentials, over, and keeps; None if it does not."""
    if not isinstance(total, fx.Node):
        return None
    summed = operand(total) if _is(total, "unsqueeze") else total
    if not _is(summed, "sum"):
        return None
    same = summed.args[0] is weights or _exponentials_of(summed.args[0]) is _exponentials_of(weights) is not None
    rank = len(example_shape(operand(summed)))
    dims = call_argument(summed, 1, "dim", None)
    if not same or not isinstance(dims, (list, tuple)) or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    dim, kept = normal_dim(dims[0], rank), bool(call_argument(summed, 2, "keepdim", False))
    if summed is total:
        return dim if kept else None
    put_back = call_argument(total, 1, "dim", None)
    return dim if isinstance(put_back, int) and normal_dim(put_back, rank) == dim and not kept else None


def _shifted_by_logsumexp(node: fx.Node) -> tuple[fx.Node, int]:
    """The same of ``exp(scores - logsumexp(scores))``."""
    shifted = operand(node)
    scores, shift = shifted.args[:2] if _is(shifted, "sub") and not shifted.kwargs else (None, None)
    if not is_tensor(scores) or not is_tensor(shift) or not _is(shift, "logsumexp") or shift.args[0] is not scores:
        raise NoMatch(node, "it subtracts something else than the logarithm of the sum", EXPONENTIALS)
    dims = call_argument(shift, 1, "dim", ())
    dims = dims if isinstance(dims, (list, tuple)) else (dims,)
    if len(dims) != 1 or not isinstance(dims[0], int) or not call_argument(shift, 2, "keepdim", False):
        raise NoMatch(node, "its sum is over several dimensions, or not kept", EXPONENTIALS)
    return scores, normal_dim(dims[0], len(example_shape(scores)))


def _turn(graph: fx.Graph, softmax: fx.Node) -> None:
    """Let a softmax over dimension -2 of transposed scores run over the last dimension of scores."""
    rank = len(example_shape(softmax))
    dim = call_argument(softmax, 1, "dim", None)
    scores = operand(softmax)
    if not isinstance(dim, int) or normal_dim(dim, rank) != rank - 2 or not has_scores(scores):
        return
    steps = list(_to_transposition(softmax))
    if not steps or not _swaps_last(steps[-1]):
        raise NoMatch(softmax, "its probabilities are not transposed behind it", TURNED)
    with graph.inserting_before(softmax):
        turned = emit(graph, softmax.target, (_turned(graph, scores), -1, *softmax.args[2:]), softmax, **softmax.kwargs)
        for step in steps[:-1]:
            turned = emit(graph, step.target, (turned, *step.args[1:]), step, **step.kwargs)
    steps[-1].replace_all_uses_with(turned)


def _to_transposition(softmax: fx.Node) -> Iterator[fx.Node]:
    """The operations behind a softmax, up to one that moves dimensions, while each is the only one that reads the value."""
    node = softmax
    while len(node.users) == 1:
        node = next(iter(node.users))
        if op_name(node) not in SAME_VALUES | {"dropout"} | PERMUTATIONS | {"mT"}:
            return
        yield node
        if op_name(node) in PERMUTATIONS | {"mT"}:
            return


def _swaps_last(node: fx.Node) -> bool:
    rank = len(example_shape(node))
    if op_name(node) not in PERMUTATIONS | {"mT"}:
        return False
    return permutation(node, rank) == (*range(rank - 2), rank - 1, rank - 2)


def _turned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``node`` with its last two dimensions exchanged: a product takes its factors the other way round."""
    if op_name(node) in PRODUCTS and op_name(node) != "baddbmm":
        first, second = (_transposed(graph, operand(node, n)) for n in (1, 0))
        return emit(graph, node.target, (first, second), node)
    if op_name(node) not in _ENTRYWISE or not has_scores(node):
        return _transposed(graph, node)
    rank = len(example_shape(node))
    args = [_turned_operand(graph, a, rank) if is_tensor(a) and op_name(node) not in CASTS else a for a in node.args]
    if op_name(node) in CASTS:
        args[0] = _turned(graph, operand(node))
    return emit(graph, node.target, tuple(args), node, **node.kwargs)


def _turned_operand(graph: fx.Graph, value: fx.Node, rank: int) -> fx.Node:
    """An operand that broadcasts to scores, turned as they are."""
    shape = example_shape(value)
    if len(shape) == rank and has_scores(value):
        return _turned(graph, value)
    if not shape or all(size == 1 for size in shape[-2:]):
        return value
    return emit(graph, aten.unsqueeze.default, (value, -1), value) if len(shape) == 1 else _transposed(graph, value)


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if _swaps_last(node):
        return operand(node)
    return emit(graph, aten.transpose.int, (node, -2, -1), node)


def _is(node: Argument, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == name
