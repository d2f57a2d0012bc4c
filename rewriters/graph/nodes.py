"""Properties of one node that every stage reads: its operation, its arguments, the shape of its value."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from rewriters.graph.op_sets import ATTENTION


class AxisError(Exception):
    """A graph does not allow what is asked of it, such as to carry labels through an operation; the message says why."""


def known_size(size: int | torch.SymInt) -> object:
    """A size as a number or an expression: equal ones are equal in all calls that the capture serves."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def example_size(size: Any) -> int:
    """The number that a static or symbolic size had in the captured example."""
    if isinstance(size, int):
        return size
    node = size.node
    hint = node.hint if node.has_hint() else None
    if hint is None:
        raise AxisError(f"the size {size} depends on data")
    return int(hint)


def example_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor in the captured example; raises :class:`AxisError` if it is not a tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise AxisError(f"{node.name} is not a tensor")
    return tuple(example_size(n) for n in value.shape)


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    """Whether ``node`` is a graph node that yields one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def normal_dim(dim: int, rank: int) -> int:
    """``dim`` counted from the front."""
    return dim + rank if dim < 0 else dim


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that issued ``node``."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def attribute(module: nn.Module, target: str) -> Any:
    """The attribute of ``module`` at the dotted path ``target``."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def op_name(node: fx.Node) -> str:
    """Name of the operation without overload: "add", "layer_norm", "getitem", "attention"."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet.__name__)
    return str(getattr(target, "__name__", target))


def is_attention(node: fx.Node) -> bool:
    """Whether ``node`` is attention, or the product of an attention map that keeps its spelling with the values."""
    return node.op == "call_function" and op_name(node) in ATTENTION


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Operands that are tensors, in order."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def operand(node: fx.Node, position: int = 0) -> fx.Node:
    """The positional argument of ``node`` that is a node itself; raises :class:`AxisError` if it is anything else."""
    value = node.args[position] if len(node.args) > position else None
    if not isinstance(value, fx.Node):
        raise AxisError(f"argument {position} of {node.name} is not computed in the graph")
    return value


def int_argument(node: fx.Node, position: int, name: str, default: int | None = None) -> int:
    """An argument that is one number; raises :class:`AxisError` if it is anything else."""
    value = call_argument(node, position, name, default)
    if not isinstance(value, int):
        raise AxisError(f"the argument {name!r} of {node.name} is not one known number")
    return value


def ints_argument(node: fx.Node, position: int, name: str) -> tuple[int, ...]:
    """An argument that is one number or several; raises :class:`AxisError` if it is anything else."""
    value = call_argument(node, position, name, None)
    values = value if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(n, int) for n in values):
        raise AxisError(f"the argument {name!r} of {node.name} is not known numbers")
    return tuple(values)


def permutation(node: fx.Node, rank: int) -> tuple[int, ...]:
    """Which dimension of its operand, of ``rank`` dimensions, each dimension of a permuted value is.

    Args:
        node: permute, movedim, transpose, swapaxes, t, mT or numpy_T.
        rank: dimensions of the operand.
    """
    name = op_name(node)
    if name == "permute":
        return tuple(normal_dim(d, rank) for d in ints_argument(node, 1, "dims"))
    if name == "numpy_T":
        return tuple(range(rank))[::-1]
    if name == "movedim":
        sources, targets = (ints_argument(node, n, side) for n, side in ((1, "source"), (2, "destination")))
        moved = {normal_dim(t, rank): normal_dim(s, rank) for s, t in zip(sources, targets, strict=True)}
        others = iter(d for d in range(rank) if d not in moved.values())
        return tuple(moved[d] if d in moved else next(others) for d in range(rank))
    order = list(range(rank))
    if rank > 1:
        swapped = (-2, -1) if name in ("t", "mT") else (int_argument(node, 1, "dim0"), int_argument(node, 2, "dim1"))
        first, second = (normal_dim(d, rank) for d in swapped)
        order[first], order[second] = second, first
    return tuple(order)


def call_argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of the operation, given by position or by name; ``default`` if it is left out."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default
