"""Typed arguments of a node, as rules read them.

Arguments of another kind raise :class:`TypeError`: the rule does not cover this form of the call.
"""

from __future__ import annotations

from torch import fx
from torch.fx.node import Argument

from rewriters.graph.nodes import call_argument, normal_dim


def operand(node: fx.Node, position: int) -> fx.Node:
    """The argument at ``position``, a tensor of the graph."""
    value = node.args[position]
    if not isinstance(value, fx.Node):
        raise TypeError(f"{value!r} is not a tensor")
    return value


def operand_list(node: fx.Node, position: int) -> list[fx.Node]:
    """The argument at ``position``, a list of tensors of the graph."""
    found = [value for value in items(node, position) if isinstance(value, fx.Node)]
    if len(found) != len(items(node, position)):
        raise TypeError(f"{node.args[position]!r} is not a list of tensors")
    return found


def items(node: fx.Node, position: int) -> list[Argument]:
    """The argument at ``position``, a list of any values."""
    value = node.args[position]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} is not a list")
    return list(value)


def integer(node: fx.Node, position: int) -> int:
    """The argument at ``position``, a number."""
    value = node.args[position]
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not a number")
    return value


def integers(node: fx.Node, position: int) -> list[int]:
    """The argument at ``position``, a list of numbers."""
    found = [value for value in items(node, position) if isinstance(value, int)]
    if len(found) != len(items(node, position)):
        raise TypeError(f"{node.args[position]!r} is not a list of numbers")
    return found


def dim_argument(node: fx.Node, position: int, rank: int, default: int | None = None) -> int:
    """The argument at ``position`` or named "dim", a dimension, counted from the front."""
    value = call_argument(node, position, "dim", default)
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not a dimension")
    return normal_dim(value, rank)


def dims_argument(node: fx.Node, position: int, rank: int) -> list[int] | None:
    """The argument at ``position`` or named "dim", one dimension or several, counted from the front; None if left out."""
    value = call_argument(node, position, "dim", None)
    if value is None:
        return None
    dims = [value] if isinstance(value, int) else list(value)
    return [normal_dim(d, rank) for d in dims]
