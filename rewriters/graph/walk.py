"""Walks along the edges of a graph.

Start at :func:`walk`, which every other walk is made of. :func:`ancestors` goes from a node to what it is computed from,
:func:`descendants` to what is computed from it, and :func:`operand_chain` along first operands only. All of them are lazy, so a
search stops where its caller stops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch import fx

from rewriters.graph.nodes import is_tensor, op_name

Predicate = Callable[[fx.Node], bool]


def walk(starts: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Yield every node that is reached from ``starts``, once, nearest first.

    Args:
        starts: nodes to start at; they are yielded first.
        onward: the nodes to go on to from a node. It is called once for each node, after the node was yielded.
    """
    waiting = deque(dict.fromkeys(starts))
    seen = set(waiting)
    while waiting:
        node = waiting.popleft()
        yield node
        for other in onward(node):
            if other not in seen:
                seen.add(other)
                waiting.append(other)


def ancestors(*starts: fx.Node, through: Predicate | None = None, among: Predicate | None = None) -> Iterator[fx.Node]:
    """Yield ``starts`` and the nodes that they are computed from, nearest first.

    Args:
        starts: nodes to start at.
        through: whether the walk goes on from a node to its operands; the node itself is yielded either way.
        among: whether the walk may enter an operand; one that it may not enter is not yielded.
    """
    return walk(starts, lambda node: _going_on(node, node.all_input_nodes, through, among))


def descendants(
    *starts: fx.Node, through: Predicate | None = None, among: Predicate | None = None
) -> Iterator[fx.Node]:
    """Yield ``starts`` and the nodes that are computed from them, nearest first; arguments as for :func:`ancestors`."""
    return walk(starts, lambda node: _going_on(node, node.users, through, among))


def _going_on(
    node: fx.Node, neighbours: Iterable[fx.Node], through: Predicate | None, among: Predicate | None
) -> Iterable[fx.Node]:
    if through is not None and not through(node):
        return ()
    return neighbours if among is None else filter(among, neighbours)


def operand_chain(value: Any, through: Predicate) -> Iterator[fx.Node]:
    """Yield ``value``, its first operand, the first operand of that, and so on; nothing if ``value`` is not a node.

    Args:
        value: an argument of a node.
        through: whether the chain goes on from a node to its first operand.
    """
    while isinstance(value, fx.Node):
        yield value
        if not value.args or not through(value):
            return
        value = value.args[0]


def behind(value: Any, names: Collection[str]) -> Any:
    """Return what ``value`` is computed from by operations of ``names`` alone, each from its first operand.

    It is ``value`` itself if another operation computes it, and may be an argument that is not a node.
    """
    while isinstance(value, fx.Node) and value.op == "call_function" and op_name(value) in names and value.args:
        value = value.args[0]
    return value


def has_values(node: fx.Node) -> bool:
    """Whether a node yields tensors, not a size or a number: a walk along values leaves out the others."""
    return is_tensor(node) or isinstance(node.meta.get("val"), (list, tuple))


def is_not_size(node: fx.Node) -> bool:
    """Whether a node yields anything but the size of a tensor, which says nothing of the tensor's values."""
    return op_name(node) != "sym_size"


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the position of every node in the order of the graph.

    To compare two nodes, ``first < second`` does; positions are for slices of ``list(graph.nodes)``.
    """
    return {node: position for position, node in enumerate(graph.nodes)}
