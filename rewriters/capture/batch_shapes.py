"""How operations that only rearrange entries are written for several images; ``batch_rules.py`` holds the other rules."""

from __future__ import annotations

from torch import fx

from rewriters.capture.batching import Batching, aten
from rewriters.graph.nodes import AxisError, int_argument, ints_argument, op_name, operand, permutation


def permute(work: Batching, node: fx.Node) -> fx.Node:
    """Permute all dimensions."""
    source = operand(node)
    shape = work.shape(source)
    rank = len(shape.sizes)
    order = permutation(node, rank)
    if shape.lead and order[0] == 0:
        return work.emit(aten.permute.default, work.env[source], list(order))
    return work.compact(work.emit(aten.permute.default, work.in_front(source), [0, *(d + 1 for d in order)]), node)


def transpose(work: Batching, node: fx.Node) -> fx.Node:
    """Swap two dimensions."""
    source = operand(node)
    shape = work.shape(source)
    first, second = (int_argument(node, at, name) % len(shape.sizes) for at, name in ((1, "dim0"), (2, "dim1")))
    if shape.lead and 0 not in (first, second):
        return work.emit(aten.transpose.int, work.env[source], first, second)
    return work.compact(work.emit(aten.transpose.int, work.in_front(source), first + 1, second + 1), node)


def unsqueeze(work: Batching, node: fx.Node) -> fx.Node:
    """Add a dimension of size 1."""
    source = operand(node)
    before = work.shape(source)
    dim = int_argument(node, 1, "dim") % (len(before.sizes) + 1)
    if dim == 0 and not before.lead:
        return work.env[source]
    if before.lead and dim > 0:
        return work.emit(aten.unsqueeze.default, work.env[source], dim)
    return work.compact(work.emit(aten.unsqueeze.default, work.in_front(source), dim + 1), node)


def regroup(work: Batching, node: fx.Node) -> fx.Node:
    """View the entries in the shape that they have for one image."""
    source = operand(node)
    before, after = work.shape(source), work.shape(node)
    if before.rest == after.rest:
        return work.env[source]
    return work.reshaped(work.env[source], after.rest)


def expand(work: Batching, node: fx.Node) -> fx.Node:
    """Expand dimensions of size 1, and add dimensions in front."""
    source = operand(node)
    after = work.shape(node)
    if source not in work.batched:
        raise AxisError(f"{op_name(node)} takes its shape from an image")
    return work.emit(aten.expand.default, work.trailing(source, len(after.rest)), [work.batch, *after.rest])


def repeat(work: Batching, node: fx.Node) -> fx.Node:
    """Repeat every dimension a number of times."""
    source = operand(node)
    after = work.shape(node)
    times = ints_argument(node, 1, "repeats")
    whole = work.in_front(source)
    for _ in range(len(after.sizes) - len(work.shape(source).sizes)):
        whole = work.emit(aten.unsqueeze.default, whole, 1)
    return work.compact(work.emit(aten.repeat.default, whole, [1, *times]), node)
