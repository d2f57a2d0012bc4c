"""What is learned and what is given."""

from __future__ import annotations

from torch import fx

from rewriters.graph.nodes import is_tensor


def _tensor_ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that ``node`` gets values from; sizes do not count."""
    stack, seen = [node], {node}
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in seen and _has_values(operand):
                seen.add(operand)
                stack.append(operand)
    return seen


def _has_values(node: fx.Node) -> bool:
    return is_tensor(node) or isinstance(node.meta.get("val"), (list, tuple))


def is_learned(node: fx.Node) -> bool:
    """Whether ``node`` depends on parameters only, not on any input."""
    return not any(n.op == "placeholder" for n in _tensor_ancestors(node))


def given_nodes(graph: fx.Graph) -> set[fx.Node]:
    """All nodes that are not :func:`is_learned`, in one walk along the graph."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in found and _has_values(n) for n in node.all_input_nodes):
            found.add(node)
    return found
