"""The residual add around an attention; start at :func:`residual_of`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from torch import fx
from torch.fx.node import Argument

from rewriters.graph.dependencies import is_learned
from rewriters.graph.nodes import AxisError, example_shape, is_attention, is_tensor, op_name, operand
from rewriters.graph.op_sets import ADDS, COPIES
from rewriters.graph.walk import ancestors, has_values, is_not_size, walk


@dataclass(frozen=True)
class Residual:
    """The residual connection around a sublayer.

    Attributes:
        before: the residual value that the sublayer reads.
        after: the add of the sublayer's output.
    """

    before: fx.Node
    after: fx.Node


def residual_of(attention: fx.Node) -> Residual:
    """The residual connection around an attention: the value that its queries come from, and the add behind it.

    Raises:
        AxisError: there is none.
    """
    query = operand(attention)
    waiting, seen = [attention], {attention}
    while waiting:
        # In the order of the graph, so that the first add behind the attention is found first.
        node = heappop(waiting)
        for user in node.users:
            if user in seen or not has_values(user) or is_attention(user):
                continue
            for other in _other_terms(user, node):
                for value in _summands(other, user):
                    if value < attention and gets_values_from(query, value):
                        return Residual(value, user)
            seen.add(user)
            heappush(waiting, user)
    raise AxisError("no residual add follows it")


def terms(operation: str, args: Sequence[Argument]) -> list[tuple[fx.Node, ...]]:
    """What an operation adds up: the nodes among the factors of each term; empty if it adds nothing.

    ``x + y`` has the terms x and y, so has ``x + weight * (y - x)`` (lerp); ``x + y * z`` (addcmul) has x and y * z.
    """
    if operation not in ADDS:
        return []
    factors = [args[:1], args[1:3] if operation == "addcmul" else args[1:2]]
    return [tuple(n for n in term if isinstance(n, fx.Node)) for term in factors]


def _other_terms(add: fx.Node, one: fx.Node) -> list[fx.Node]:
    """What ``add`` adds to a term that ``one`` is, or is a factor of."""
    found = terms(op_name(add), add.args)
    if not any(one in term for term in found):
        return []
    return [n for term in found if one not in term for n in term]


def _summands(value: fx.Node, like: fx.Node) -> Iterable[fx.Node]:
    """``value`` and what it is a sum of, of the shape of ``like``: sublayers in parallel are added one after the other. A value
    is also taken to be a sum of what it is a copy of, or the product of with a number or a learned scale."""

    def fits(node: fx.Node) -> bool:
        return is_tensor(node) and example_shape(node) == example_shape(like)

    def parts(node: fx.Node) -> Iterable[fx.Node]:
        found = [n for term in terms(op_name(node), node.args) for n in term]
        if op_name(node) in COPIES or _is_scaled(node):
            found = [n for n in node.args[:2] if isinstance(n, fx.Node)]
        return filter(fits, found)

    return walk([value] if fits(value) else [], parts)


def _is_scaled(value: fx.Node) -> bool:
    """Whether a value is another one times, or divided by, a number or a learned scale."""
    if op_name(value) not in ("mul", "div") or len(value.args) < 2:
        return False
    first, second = value.args[:2]
    scales = (second,) if op_name(value) == "div" else (first, second)
    return any(isinstance(n, (int, float)) or (is_tensor(n) and is_learned(n)) for n in scales)


def gets_values_from(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether ``node`` is computed from the values of ``ancestor``; sizes do not count."""
    return any(n is ancestor for n in ancestors(node, among=lambda n: is_not_size(n) and not n < ancestor))
