"""What every stage asks of one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


class AxisError(Exception):
    """Labels cannot be carried through an operation; the message says why."""


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


def is_tensor(node: Any) -> bool:
    """Whether ``node`` is a graph node that yields one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def normal_dim(dim: int, rank: int) -> int:
    """``dim`` counted from the front."""
    return dim + rank if dim < 0 else dim


ADDS = frozenset(("add",))


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
    return node.op == "call_function" and op_name(node) in ("attention", "weigh")


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Operands that are tensors, in order."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def call_argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default
