"""Whether a value is computed from parameters alone, or from inputs too."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from rewriters.graph.walk import ancestors, has_values


def value_ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Yield ``node`` and all nodes that it gets values from; sizes do not count."""
    return ancestors(node, among=has_values)


def is_learned(node: fx.Node) -> bool:
    """Whether ``node`` depends on parameters only, not on any input."""
    return not any(n.op == "placeholder" for n in value_ancestors(node))


def given_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return all nodes that are not :func:`is_learned`, in one pass over the graph."""
    given: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in given and has_values(n) for n in node.all_input_nodes):
            given.add(node)
    return given
