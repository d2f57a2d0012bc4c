"""Rules of operations that move, join and repeat dimensions; see ``table.py`` for the table."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from rewriters.axes.arguments import dim_argument, dims_argument, items, operand_list
from rewriters.axes.labels import (
    Axis,
    Dim,
    Factor,
    LabelMap,
    Labels,
    axes_of,
    dim_size,
    has_tokens,
    is_plain,
    plain,
    relabel_view,
    seed,
    token_axis,
)
from rewriters.axes.outcome import Outcome, Resize, broadcast, elementwise_outcome, require_plain, same_axes
from rewriters.axes.readouts import ConcatenationReadout, RejoinedReadout
from rewriters.axes.sources import Bound, Concatenation, Rest, Source, TokenRange
from rewriters.graph.nodes import AxisError, example_shape, op_name, permutation


def permute(node: fx.Node, labels: LabelMap) -> Outcome:
    """permute, transpose, t, mT: dimensions in a new order."""
    own = labels.of(node.args[0])
    return Outcome(labels=Labels(own[d] for d in permutation(node, len(own))))


def unsqueeze(node: fx.Node, labels: LabelMap) -> Outcome:
    """Adds a dimension of size 1."""
    own = list(labels.of(node.args[0]))
    own.insert(dim_argument(node, 1, len(own) + 1), plain(1))
    return Outcome(labels=Labels(own))


def squeeze(node: fx.Node, labels: LabelMap) -> Outcome:
    """Removes dimensions of size 1."""
    own = labels.of(node.args[0])
    dims = dims_argument(node, 1, len(own))
    squeezed = range(len(own)) if dims is None else dims
    return Outcome(labels=Labels(x for d, x in enumerate(own) if not (d in squeezed and dim_size(x) == 1)))


def view(node: fx.Node, labels: LabelMap) -> Outcome:
    """view, reshape, flatten, unflatten: factors are regrouped, baked-in token counts are replaced."""
    own = labels.of(node.args[0])
    shape = example_shape(node)
    result = relabel_view(own, shape)
    name = op_name(node)
    if name == "flatten":
        return Outcome(labels=result)
    argument, first = (2, dim_argument(node, 1, len(own))) if name == "unflatten" else (1, 0)
    sizes = node.args[argument]
    if not isinstance(sizes, (list, tuple)):
        raise AxisError("a view to another type")
    resizes: list[Resize] = []
    inferred = any(n == -1 for n in sizes if isinstance(n, int))
    for position, size in enumerate(sizes):
        dim = result[first + position]
        if not has_tokens(dim) or (isinstance(size, int) and size == -1):
            continue
        if len(dim) == 1:
            resizes.append(Resize(argument, position, dim[0].axis))
        elif inferred:
            raise AxisError("a view that infers one size while a folded token axis needs the same")
        else:
            inferred = True
            resizes.append(Resize(argument, position, None))
    return Outcome(labels=result, resizes=tuple(resizes))


def reshape_as(node: fx.Node, labels: LabelMap) -> Outcome:
    """A view to the shape of another tensor, which must run along the same tokens."""
    own, other = (labels.of(node.args[i]) for i in (0, 1))
    result = relabel_view(own, example_shape(node))
    if not all(same_axes(d, o) for d, o in zip(result, other, strict=True) if has_tokens(d) or has_tokens(o)):
        raise AxisError("a view to the shape of a tensor that runs along other tokens")
    return Outcome(labels=result)


def expand(node: fx.Node, labels: LabelMap) -> Outcome:
    """Dimensions of size 1 are repeated without a copy; others keep their size."""
    own = labels.of(node.args[0])
    shape = example_shape(node)
    new = len(shape) - len(own)
    result = Labels(plain(n) if d < new or is_plain(own[d - new]) else own[d - new] for d, n in enumerate(shape))
    return Outcome(labels=result, resizes=tuple(Resize(1, d, None) for d, dim in enumerate(result) if has_tokens(dim)))


def repeat(node: fx.Node, labels: LabelMap) -> Outcome:
    """Copies along dimensions that run along no axis, or of tokens that are folded with the batch, one copy after the other."""
    own = labels.of(node.args[0])
    times = items(node, 1)
    new = len(times) - len(own)
    result: list[Dim] = [plain(n) for n in example_shape(node)]
    for at, (dim, count) in enumerate(zip(own, times[new:], strict=True), new):
        if is_plain(dim):
            continue
        if count == 1:
            result[at] = dim
        elif has_tokens(dim) and len(dim) > 1 and isinstance(count, int):
            result[at] = (Factor(None, count), *dim)
        else:
            raise AxisError(f"repeat along {axes_of(dim)}")
    return Outcome(labels=Labels(result))


def cat(node: fx.Node, labels: LabelMap) -> Outcome:
    """Concatenation; along tokens it joins token axes, or rejoins one that was cut. Other dimensions must agree."""
    # torch lets an empty vector stand for "nothing" in a concatenation.
    operands = [n for n in operand_list(node, 0) if example_shape(n) != (0,)]
    if len(operands) == 1:
        return Outcome(labels=labels.of(operands[0]))
    shape = example_shape(node)
    dim = dim_argument(node, 1, len(shape), default=0)
    along = [labels.of(n)[dim] for n in operands]
    if not any(map(has_tokens, along)):
        require_plain(along, node)
        return elementwise_outcome(operands, labels, shape)
    axes = tuple(map(token_axis, along))
    return _put_together(operands, labels, axes=axes, dim=dim) or _concatenate(
        node, labels, operands=operands, axes=axes, dim=dim
    )


@dataclass(frozen=True)
class _Range:
    """Tokens of ``parent`` from ``start`` to ``end``; None for tokens that always come first, whatever they are."""

    parent: Source | None
    start: Bound
    end: Bound


def _range(axis: Axis | None, size: int) -> _Range | None:
    """The range that an operand of a concatenation is; None if it is anything else."""
    source = None if axis is None else axis.source
    if source is None:
        return _Range(None, 0, size)
    if isinstance(source, TokenRange):
        return _Range(source.parent, source.start, source.end)
    return _Range(source.parent, source.start, None) if isinstance(source, Rest) else None


def _put_together(
    operands: list[fx.Node], labels: LabelMap, *, axes: tuple[Axis | None, ...], dim: int
) -> Outcome | None:
    """``cat([f(x[:k]), g(x[k:])])``: the tokens of ``x`` again, in two parts or more; None if it is anything else.

    The first tokens, where they are so few that they are protected, run along no axis: they stand where they stood.
    """
    sizes = [example_shape(n)[dim] for n in operands]
    ranges = [one for axis, size in zip(axes, sizes, strict=True) if (one := _range(axis, size)) is not None]
    found = {one.parent for one in ranges} - {None}
    borders = [(before.end, after.start) for before, after in pairwise(ranges)]
    if len(ranges) != len(operands) or len(found) != 1 or any(end is None or end != start for end, start in borders):
        return None
    whole = ranges[0].start == 0 and ranges[-1].end is None and all(one.parent is not None for one in ranges[1:])
    parent = found.pop()
    if parent is None or not whole:
        return None
    own = labels.of(operands[-1])
    axis = Axis("tokens", parent)
    result = own.with_dim(dim, (Factor(axis, sum(sizes)),))
    if len(operands) == 2 and ranges[0].parent is None:
        return Outcome(labels=result)
    starts = tuple(one.start for one in ranges)
    return Outcome(labels=result, readout=RejoinedReadout(axis=axis, dim=dim, batch_dim=own.batch_dim(), starts=starts))


def _concatenate(
    node: fx.Node, labels: LabelMap, *, operands: list[fx.Node], axes: tuple[Axis | None, ...], dim: int
) -> Outcome:
    """The operands' tokens one after the other, an axis of their own."""
    source = Concatenation(tuple(None if a is None else a.source for a in axes), node)
    every = [labels.of(n) for n in operands]
    places = {own.batch_and_heads() for own, axis in zip(every, axes, strict=True) if axis is not None}
    if len(places) != 1 or any(has_tokens(d) for own in every for at, d in enumerate(own) if at != dim):
        raise AxisError("a concatenation of tokens whose batches do not agree")
    batch_dim, heads = places.pop()
    result = seed(example_shape(node), batch_dim=batch_dim, token_dim=dim, source=source)
    ((batch, rows),) = result[batch_dim]
    if heads > 1:
        result = result.with_dim(batch_dim, (Factor(batch, rows // heads), Factor(None, heads)))
    return Outcome(labels=result, readout=ConcatenationReadout(axis=Axis("tokens", source), dim=dim))


def stack(node: fx.Node, labels: LabelMap) -> Outcome:
    """Operands of equal labels along a new dimension."""
    operands = operand_list(node, 0)
    shape = example_shape(node)
    dim = dim_argument(node, 1, len(shape), default=0)
    merged = broadcast(operands, labels, shape[:dim] + shape[dim + 1 :])
    result = Labels((*merged.labels[:dim], plain(len(operands)), *merged.labels[dim:]))
    return Outcome(labels=result, aligns=merged.aligns)
