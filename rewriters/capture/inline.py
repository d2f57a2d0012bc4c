"""Inline the graphs that export makes of code under ``no_grad`` or without autocast.

Start at :func:`inline_bodies`. The effect of the context stays: values computed without gradients are detached. Matrix products
that were computed without autocast still are, if a graph is captured under autocast. Otherwise it serves calls without autocast
alone, to which the context makes no difference.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from madtp.programs.program import without_autocast
from rewriters.graph.nodes import attribute

GRADIENTS, AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
# Operations that autocast runs in lower precision.
CAST = frozenset("linear matmul bmm mm addmm baddbmm einsum conv1d conv2d conv3d scaled_dot_product_attention".split())


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
        shielding = _is_gradients(wrapped) or torch.is_autocast_enabled(str(wrapped.args[0]))
        unshielded |= not shielding
        _inline(module, wrapped, shielding=shielding)


def _is_wrapper(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in (GRADIENTS, AUTOCAST):
        return False
    return name == GRADIENTS or node.args[2] is False


def _is_gradients(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == GRADIENTS


def _inline(module: fx.GraphModule, node: fx.Node, *, shielding: bool) -> None:
    gradients = _is_gradients(node)
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
                if not gradients and shielding and _name(one) in CAST:
                    _shield(env[one], str(node.args[0]))
        if gradients and node.args[0] is False:
            results = fx.map_arg(results, lambda n: _detached(graph, n))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not inner.users:
        graph.erase_node(inner)


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", ""))


def _shield(node: fx.Node, device_type: str) -> None:
    operation: Any = node.target
    node.args = (operation, device_type, *node.args)
    node.target = without_autocast


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    new = graph.call_function(torch.ops.aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new
