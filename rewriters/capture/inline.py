"""Inline the graphs that export makes of code under ``no_grad``, and under autocast that a model switches on or off.

Start at :func:`inline_bodies`. The effect of the context stays: values computed without gradients are detached, and what
autocast casts is cast by operations of the graph. Matrix products that were computed in a context of the model's own still are,
if a graph is captured under autocast. Otherwise it serves calls without autocast alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from madtp.programs.program import without_autocast
from rewriters.graph.functional import writes
from rewriters.graph.node_record import record, set_record
from rewriters.graph.nodes import attribute, operand

GRADIENTS, AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
# Operations that autocast runs in lower precision.
CAST = frozenset("linear matmul bmm mm addmm baddbmm einsum conv1d conv2d conv3d scaled_dot_product_attention".split())
# What autocast casts: numbers in double precision stay as they are.
CASTABLE = frozenset([torch.float32, torch.bfloat16, torch.float16])


def inline_bodies(module: fx.GraphModule) -> bool:
    """Inline in place, nested graphs too; contexts of other kinds stay as they are.

    Returns:
        Whether the graph serves calls without autocast alone.
    """
    unshielded = False
    while True:
        wrapped = next((n for n in module.graph.nodes if _is_wrapper(n)), None)
        if wrapped is None:
            return unshielded
        inside = _is_gradients(wrapped) or torch.is_autocast_enabled(str(wrapped.args[0]))
        unshielded |= not inside
        _inline(module, wrapped, shielding=inside and not _is_alike(wrapped))


def _is_wrapper(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in (GRADIENTS, AUTOCAST)


def _is_gradients(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == GRADIENTS


def _is_alike(node: fx.Node) -> bool:
    """Whether a node wraps code under the autocast that is on around it."""
    casting = None if _is_gradients(node) else _casting(node)
    return casting is not None and casting.dtype == torch.get_autocast_dtype(casting.device_type)


def _inline(module: fx.GraphModule, node: fx.Node, *, shielding: bool) -> None:
    gradients = _is_gradients(node)
    casting = None if gradients else _casting(node)
    place = 1 if gradients else 4
    inner: Any = node.args[place]
    body: fx.GraphModule = attribute(module, str(inner.target))
    graph = module.graph
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    env: dict[fx.Node, Any] = dict(zip(placeholders, node.args[place + 1 :], strict=True))
    with graph.inserting_before(node):
        for one in body.graph.nodes:
            if one.op == "get_attr":
                name = f"{inner.target}_{one.target}".replace(".", "_")
                setattr(module, name, attribute(body, str(one.target)))
                env[one] = graph.get_attr(name)
                env[one].meta = dict(one.meta)
            elif one.op == "output":
                results = fx.map_arg(one.args[0], lambda n: env[n])
            elif one.op != "placeholder":
                env[one] = graph.node_copy(one, lambda n: env[n])
                if casting is not None:
                    casting.cast_inputs(env[one])
                if not gradients and shielding and _name(one) in CAST:
                    _shield(env[one], str(node.args[0]))
                if gradients and node.args[0] is False:
                    env[one].meta = dict(one.meta)
                    set_record(env[one], replace(record(one), without_gradients=True))
        if gradients and node.args[0] is False:
            results = fx.map_arg(results, lambda n: _detached(graph, n))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not inner.users:
        graph.erase_node(inner)


@dataclass(frozen=True)
class _Casting:
    """What autocast does to the operations of a graph: it casts their inputs.

    Attributes:
        device_type: Only tensors on devices of this type are cast.
        dtype: What inputs of matrix products are cast to.
    """

    device_type: str
    dtype: torch.dtype

    def cast_inputs(self, node: fx.Node) -> None:
        """Cast the inputs of an operation as autocast does.

        What is no matrix product is computed at least as precisely as the trace shows.
        """
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or _chooses_dtype(node):
            return
        product = _name(node) in CAST
        dtype = self.dtype if product else value.dtype
        cast: dict[fx.Node, fx.Node] = {}
        for one in node.all_input_nodes:
            given = one.meta.get("val")
            if not isinstance(given, torch.Tensor) or given.device.type != self.device_type:
                continue
            if given.dtype in CASTABLE and (given.dtype != dtype if product else given.dtype.itemsize < dtype.itemsize):
                cast[one] = _cast(node, one, given, dtype)
        for old, new in cast.items():
            node.replace_input_with(old, new)


def _casting(node: fx.Node) -> _Casting | None:
    """The effect of a node that wraps code under autocast; None where it is off."""
    device_type, dtype, enabled = node.args[:3]
    if not enabled:
        return None
    assert isinstance(device_type, str)
    return _Casting(device_type, dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(device_type))


def _chooses_dtype(node: fx.Node) -> bool:
    """Whether an operation is told the dtype of its result."""
    arguments = (*node.args, *node.kwargs.values())
    return _name(node) in ("to", "_to_copy", "type_as") or any(isinstance(one, torch.dtype) for one in arguments)


def _cast(node: fx.Node, given: fx.Node, value: torch.Tensor, dtype: torch.dtype) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(torch.ops.aten.to.dtype, (given, dtype))
    new.meta = {**{k: v for k, v in node.meta.items() if k == "nn_module_stack"}, "val": value.to(dtype)}
    return new


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", ""))


def _shield(node: fx.Node, device_type: str) -> None:
    operation: Any = node.target
    node.args = (operation, device_type, *node.args)
    node.target = without_autocast


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    while writes(node):  # what was written to has the gradients that it had
        node = operand(node)
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    if node.op in ("get_attr", "placeholder"):
        return node
    new = graph.call_function(torch.ops.aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new
