"""How operations that only rearrange entries are written for several images; ``batch_rules.py`` holds the other rules."""

from __future__ import annotations

from typing import Any

from torch import fx

from rewriters.capture.batching import Batching, aten
from rewriters.graph.nodes import AxisError, call_argument, op_name, operand


def permute(work: Batching, node: fx.Node) -> fx.Node:
    """All dimensions in another order."""
    source = operand(node)
    shape = work.shape(source)
    rank = len(shape.sizes)
    order = _order(node, rank)
    if shape.lead and order[0] == 0:
        return work.emit(aten.permute.default, work.env[source], order)
    return work.compact(work.emit(aten.permute.default, work.in_front(source), [0, *(d + 1 for d in order)]), node)


def _order(node: fx.Node, rank: int) -> list[int]:
    if op_name(node) == "permute":
        dims: Any = call_argument(node, 1, "dims", None)
        return [d % rank for d in dims]
    if op_name(node) in ("t", "numpy_T"):
        return list(range(rank))[::-1]
    sources, targets = ([a] if isinstance(a, int) else a for a in node.args[1:3])
    return _moved(rank, sources, targets)


def transpose(work: Batching, node: fx.Node) -> fx.Node:
    """Two dimensions in each other's place."""
    source = operand(node)
    shape = work.shape(source)
    dims: Any = node.args[1:3]
    first, second = (int(d) % len(shape.sizes) for d in dims)
    if shape.lead and 0 not in (first, second):
        return work.emit(aten.transpose.int, work.env[source], first, second)
    return work.compact(work.emit(aten.transpose.int, work.in_front(source), first + 1, second + 1), node)


def _moved(rank: int, sources: Any, targets: Any) -> list[int]:
    placed = {t % rank: s % rank for s, t in zip(sources, targets, strict=True)}
    others = iter(d for d in range(rank) if d not in placed.values())
    return [placed[d] if d in placed else next(others) for d in range(rank)]


def unsqueeze(work: Batching, node: fx.Node) -> fx.Node:
    """A further dimension of size 1."""
    source = operand(node)
    before = work.shape(source)
    dim = int(call_argument(node, 1, "dim", 0)) % (len(before.sizes) + 1)
    if dim == 0 and not before.lead:
        return work.env[source]
    if before.lead and dim > 0:
        return work.emit(aten.unsqueeze.default, work.env[source], dim)
    return work.compact(work.emit(aten.unsqueeze.default, work.in_front(source), dim + 1), node)


def regroup(work: Batching, node: fx.Node) -> fx.Node:
    """The same entries in the shape that they have for one image."""
    source = operand(node)
    before, after = work.shape(source), work.shape(node)
    if before.rest == after.rest:
        return work.env[source]
    return work.reshaped(work.env[source], after.rest)


def expand(work: Batching, node: fx.Node) -> fx.Node:
    """Dimensions of size 1 repeated, and further ones in front."""
    source = operand(node)
    after = work.shape(node)
    if source not in work.batched:
        raise AxisError(f"{op_name(node)} takes its shape from an image")
    return work.emit(aten.expand.default, work.trailing(source, len(after.rest)), [work.batch, *after.rest])


def repeat(work: Batching, node: fx.Node) -> fx.Node:
    """Every dimension a number of times."""
    source = operand(node)
    after = work.shape(node)
    times: Any = node.args[1]
    whole = work.in_front(source)
    for _ in range(len(after.sizes) - len(work.shape(source).sizes)):
        whole = work.emit(aten.unsqueeze.default, whole, 1)
    return work.compact(work.emit(aten.repeat.default, whole, [1, *times]), node)
