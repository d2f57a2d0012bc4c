"""The residual add around an attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from rewriters.graph.nodes import ADDS, AxisError, example_shape, is_attention, is_tensor, op_name
from rewriters.graph.origins import is_learned


def residual_of(attention: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node, fx.Node]:
    """The residual value that the queries come from, and the add behind the attention."""
    query: Any = attention.args[0]
    seen = {attention}
    frontier = [attention]
    while frontier:
        frontier.sort(key=order.__getitem__, reverse=True)
        node = frontier.pop()
        for user in node.users:
            if user in seen or not is_tensor(user) or is_attention(user):
                continue
            if op_name(user) in ADDS:
                operands: tuple[Any, ...] = user.args[:2]
                for other in operands:
                    for value in _summands(other, user) if other is not node else ():
                        if order[value] < order[attention] and _descends(query, value, order):
                            return value, user
            seen.add(user)
            frontier.append(user)
    raise AxisError("no residual add follows it")


def _summands(value: Any, like: fx.Node) -> Iterator[fx.Node]:
    """``value`` and what it is a sum of, of the shape of ``like``: sublayers side by side are added one after the other. So is
    what it is by a learned scale."""
    waiting = [value]
    while waiting:
        value = waiting.pop(0)
        if is_tensor(value) and example_shape(value) == example_shape(like):
            yield value
            if op_name(value) in ADDS or _is_scaled(value):
                waiting.extend(value.args[:2])


def _is_scaled(value: fx.Node) -> bool:
    """Whether a value is another one by a learned scale."""
    operands: tuple[Any, ...] = value.args[:2]
    return op_name(value) == "mul" and any(is_tensor(n) and is_learned(n) for n in operands)


def _descends(node: fx.Node, ancestor: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether ``node`` gets values from ``ancestor``; sizes do not count."""
    limit = order[ancestor]
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current is ancestor:
            return True
        for operand in current.all_input_nodes:
            if operand not in seen and order[operand] >= limit and op_name(operand) != "sym_size":
                seen.add(operand)
                stack.append(operand)
    return False
