"""Causality: whether an attention hides later tokens, told from its mask on the example inputs.

Start at :func:`hides_later_keys`. Where structure alone does not tell, part of the graph is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from madtp.tokens.attention import HIDDEN
from rewriters.canonicalise.attention_maps import MapMask, masks_of_map
from rewriters.graph.nodes import attribute, op_name
from rewriters.graph.walk import ancestors


@dataclass(frozen=True)
class Example:
    """A graph with the example inputs that it was captured from.

    Attributes:
        graph: The canonicalised graph.
        inputs: Flattened inputs, in the order of the placeholders.
        module: Resolves the graph's parameters and constants.
    """

    graph: fx.Graph
    inputs: Sequence[Any]
    module: nn.Module

    def evaluate(self, wanted: fx.Node) -> object:
        """The value of a node on the example inputs; only its ancestors are computed."""
        needed = set(ancestors(wanted))
        values: dict[fx.Node, Any] = dict(zip(self.graph.find_nodes(op="placeholder"), self.inputs, strict=True))
        with torch.no_grad():
            for node in sorted(needed - values.keys()):
                if node.op == "get_attr":
                    values[node] = attribute(self.module, str(node.target))
                elif node.op == "call_function" and callable(node.target):
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                    values[node] = node.target(*args, **kwargs)
        return values[wanted]


def hides_later_keys(example: Example, attention: fx.Node, tokens: tuple[int, int] | None = None) -> bool:
    """Whether the attention is causal: no query sees a later key on the example inputs.

    Args:
        example: The graph of ``attention`` with its inputs.
        attention: A canonical attention node.
        tokens: Look at the tokens from the first to before the second of these positions only.
    """
    if len(attention.args) > 5 and attention.args[5]:
        return True
    if op_name(attention) == "weigh":
        masks = masks_of_map(attention)
    else:
        added = attention.args[3] if len(attention.args) > 3 else None
        masks = [MapMask("add", added)] if isinstance(added, fx.Node) else []
    seen: Tensor | None = None
    for mask in masks:
        value = example.evaluate(mask.node)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-1] != value.shape[-2]:
            continue
        shown = value if value.dtype == torch.bool else value > HIDDEN
        shown = ~shown if mask.kind == "hide" else shown
        seen = shown if seen is None else seen & shown
    if seen is None or seen.shape[-1] < 2:
        return False
    if tokens is not None:
        seen = seen[..., slice(*tokens), slice(*tokens)]
    return not bool(seen.triu(1).any())
