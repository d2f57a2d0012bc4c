"""New nodes that carry the shapes of their values; start at :func:`emit`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriters.graph.nodes import AxisError


def emit(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
    """A new node at the graph's insertion point, with the shape of its value and the module path of ``like``.

    Raises:
        AxisError: the operation does not take operands of these shapes.
    """
    node = graph.call_function(target, args, kwargs)
    if "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
    values = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (args, kwargs))
    fake = like.meta["val"].fake_mode if hasattr(like.meta.get("val"), "fake_mode") else None
    if fake is None:
        raise AxisError(f"{like.name} carries no shape")
    try:
        with fake, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
    except Exception as error:  # shapes that do not fit raise many kinds
        graph.erase_node(node)
        raise AxisError(f"the shapes of {like.name} do not fit: {error}") from error
    return node
