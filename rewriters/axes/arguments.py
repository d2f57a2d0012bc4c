"""Typed arguments of a node that are lists or dimensions; ``graph/nodes.py`` has those that are single values.

Arguments of another kind raise :class:`AxisError`.
"""

from __future__ import annotations

from torch import fx
from torch.fx.node import Argument

from rewriters.graph.nodes import AxisError, call_argument, int_argument, ints_argument, normal_dim


def items(node: fx.Node, position: int) -> list[Argument]:
    """The argument at ``position``, a list of any values."""
    value = node.args[position]
    if not isinstance(value, (list, tuple)):
        raise AxisError(f"argument {position} of {node.name} is not a list")
    return list(value)


def operand_list(node: fx.Node, position: int) -> list[fx.Node]:
    """The argument at ``position``, a list of nodes."""
    values = items(node, position)
    found = [value for value in values if isinstance(value, fx.Node)]
    if len(found) != len(values):
        raise AxisError(f"argument {position} of {node.name} is not a list of values computed in the graph")
    return found


def dim_argument(node: fx.Node, position: int, rank: int, default: int | None = None) -> int:
    """The argument at ``position`` or named "dim", a dimension, counted from the front."""
    return normal_dim(int_argument(node, position, "dim", default), rank)


def dims_argument(node: fx.Node, position: int, rank: int) -> list[int] | None:
    """The argument at ``position`` or named "dim", dimensions counted from the front; None if it is left out."""
    if call_argument(node, position, "dim", None) is None:
        return None
    return [normal_dim(d, rank) for d in ints_argument(node, position, "dim")]
