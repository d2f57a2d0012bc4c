"""Evaluate parts of a graph on the example inputs.

Start at :func:`evaluate`. Used where structure alone does not tell: whether a mask is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from madtp.tokens.attention import HIDDEN
from rewriters.canonicalise.attention_maps import MapMask, masks_of_map
from rewriters.graph.nodes import attribute, op_name


def evaluate(graph: fx.Graph, wanted: fx.Node, inputs: Sequence[Any], module: nn.Module) -> Any:
    """Value of ``wanted`` on ``inputs`` (flattened, in placeholder order); only its ancestors are computed."""
    needed, stack = {wanted}, [wanted]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in needed:
                needed.add(operand)
                stack.append(operand)
    values: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    with torch.no_grad():
        for node in sorted(needed - values.keys()):
            if node.op == "get_attr":
                values[node] = attribute(module, str(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[wanted]


def hides_later_keys(
    graph: fx.Graph,
    attention: fx.Node,
    inputs: Sequence[Any],
    module: nn.Module,
    among: tuple[int, int] | None = None,
) -> bool:
    """Whether no query of the attention node sees a later key on the example inputs (causal attention); ``among``: looking at
    the tokens between two positions only."""
    if len(attention.args) > 5 and attention.args[5]:
        return True
    if op_name(attention) == "weigh":
        masks = masks_of_map(attention)
    else:
        added = attention.args[3] if len(attention.args) > 3 else None
        masks = [MapMask("add", added)] if isinstance(added, fx.Node) else []
    seen: torch.Tensor | None = None
    for mask in masks:
        value = evaluate(graph, mask.node, inputs, module)
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[-1] != value.shape[-2]:
            continue
        shown = value if value.dtype == torch.bool else value > HIDDEN
        shown = ~shown if mask.kind == "hide" else shown
        seen = shown if seen is None else seen & shown
    if seen is None or seen.shape[-1] < 2:
        return False
    if among is not None:
        seen = seen[..., slice(*among), slice(*among)]
    return not bool(seen.triu(1).any())
