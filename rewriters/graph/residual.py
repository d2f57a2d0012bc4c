"""The residual add around an attention; start at :func:`residual_of`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from torch import fx

from rewriters.graph.dependencies import is_learned
from rewriters.graph.nodes import AxisError, example_shape, is_attention, is_tensor, op_name, operand
from rewriters.graph.op_sets import ADDS
from rewriters.graph.walk import ancestors, is_not_size, walk


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
            if user in seen or not is_tensor(user) or is_attention(user):
                continue
            if op_name(user) in ADDS:
                for other in user.args[:2]:
                    for value in _summands(other, user) if isinstance(other, fx.Node) and other is not node else ():
                        if value < attention and gets_values_from(query, value):
                            return Residual(value, user)
            seen.add(user)
            heappush(waiting, user)
    raise AxisError("no residual add follows it")


def _summands(value: fx.Node, like: fx.Node) -> Iterable[fx.Node]:
    """``value`` and what it is a sum of, of the shape of ``like``: sublayers in parallel are added one after the other. A value
    is also taken to be a sum of what it is the product of with a learned scale."""

    def fits(node: object) -> bool:
        return isinstance(node, fx.Node) and is_tensor(node) and example_shape(node) == example_shape(like)

    def parts(node: fx.Node) -> Iterable[fx.Node]:
        is_sum = op_name(node) in ADDS or _is_scaled(node)
        return [n for n in node.args[:2] if isinstance(n, fx.Node) and fits(n)] if is_sum else ()

    return walk([value] if fits(value) else [], parts)


def _is_scaled(value: fx.Node) -> bool:
    """Whether a value is another one times a learned scale."""
    return op_name(value) == "mul" and any(
        isinstance(n, fx.Node) and is_tensor(n) and is_learned(n) for n in value.args[:2]
    )


def gets_values_from(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether ``node`` is computed from the values of ``ancestor``; sizes do not count."""
    return any(n is ancestor for n in ancestors(node, among=lambda n: is_not_size(n) and not n < ancestor))
