"""Rules of operations that move, join and repeat dimensions; see ``table.py`` for the table."""

from __future__ import annotations

from typing import Any

from torch import fx

from rewriters.axes.labels import (
    Axis,
    Dim,
    Factor,
    Labels,
    axes_of,
    dim_size,
    has_tokens,
    is_plain,
    plain,
    relabel_view,
    token_axis,
)
from rewriters.axes.outcome import (
    LabelMap,
    Outcome,
    Readout,
    Resize,
    batch_dim_of,
    broadcast,
    labels_of,
    require_plain,
    same_axes,
)
from rewriters.graph.nodes import AxisError, call_argument, example_shape, normal_dim, op_name


def transpose(node: fx.Node, labels: LabelMap) -> Outcome:
    """Two dimensions change places."""
    own = list(labels_of(node.args[0], labels))
    if op_name(node) in ("t", "numpy_T", "mT"):
        return Outcome(labels=tuple(own[:-2] + own[:-3:-1]))
    first, second = (normal_dim(d, len(own)) for d in node.args[1:3])  # type: ignore[arg-type]
    own[first], own[second] = own[second], own[first]
    return Outcome(labels=tuple(own))


def permute(node: fx.Node, labels: LabelMap) -> Outcome:
    """Dimensions in a new order."""
    own = labels_of(node.args[0], labels)
    return Outcome(labels=tuple(own[normal_dim(d, len(own))] for d in node.args[1]))  # type: ignore[union-attr, arg-type]


def unsqueeze(node: fx.Node, labels: LabelMap) -> Outcome:
    """A new dimension of size 1."""
    own = list(labels_of(node.args[0], labels))
    own.insert(normal_dim(node.args[1], len(own) + 1), plain(1))  # type: ignore[arg-type]
    return Outcome(labels=tuple(own))


def squeeze(node: fx.Node, labels: LabelMap) -> Outcome:
    """Dimensions of size 1 go."""
    own = labels_of(node.args[0], labels)
    dims = call_argument(node, 1, "dim", None)
    wanted = range(len(own)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {normal_dim(d, len(own)) for d in wanted}
    return Outcome(labels=tuple(x for d, x in enumerate(own) if not (d in gone and dim_size(x) == 1)))


def view(node: fx.Node, labels: LabelMap) -> Outcome:
    """view, reshape, flatten, unflatten: factors are regrouped, baked-in token counts are replaced."""
    own = labels_of(node.args[0], labels)
    shape = example_shape(node)
    result = relabel_view(own, shape)
    name = op_name(node)
    if name == "flatten":
        return Outcome(labels=result)
    argument, first = (2, normal_dim(node.args[1], len(own))) if name == "unflatten" else (1, 0)  # type: ignore[arg-type]
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
    """A view to the shape of another tensor: of the same tokens, else its size would be another one's."""
    own, other = (labels_of(node.args[i], labels) for i in (0, 1))
    result = relabel_view(own, example_shape(node))
    if not all(same_axes(d, o) for d, o in zip(result, other, strict=True) if has_tokens(d) or has_tokens(o)):
        raise AxisError("a view to the shape of a tensor that runs along other tokens")
    return Outcome(labels=result)


def expand(node: fx.Node, labels: LabelMap) -> Outcome:
    """Dimensions of size 1 are repeated without a copy; others keep their size."""
    own = labels_of(node.args[0], labels)
    shape = example_shape(node)
    new = len(shape) - len(own)
    result = tuple(plain(n) if d < new or is_plain(own[d - new]) else own[d - new] for d, n in enumerate(shape))
    return Outcome(labels=result, resizes=tuple(Resize(1, d, None) for d, dim in enumerate(result) if has_tokens(dim)))


def repeat(node: fx.Node, labels: LabelMap) -> Outcome:
    """Copies along dimensions that run along no axis, or of tokens that are folded with the batch, one copy after the other."""
    own = labels_of(node.args[0], labels)
    times = list(node.args[1])  # type: ignore[arg-type]
    new = len(times) - len(own)
    result: list[Dim] = [plain(n) for n in example_shape(node)]
    for at, (dim, count) in enumerate(zip(own, times[new:], strict=True), new):
        if is_plain(dim):
            continue
        if count != 1 and not (has_tokens(dim) and len(dim) > 1 and isinstance(count, int)):
            raise AxisError(f"repeat along {axes_of(dim)}")
        result[at] = dim if count == 1 else (Factor(None, count), *dim)
    return Outcome(labels=tuple(result))


def cat(node: fx.Node, labels: LabelMap) -> Outcome:
    """Concatenation; along tokens it joins token axes, or puts one together again that was cut. Other dimensions must
    agree."""
    # torch lets an empty vector stand for "nothing" in a concatenation.
    listed: Any = node.args[0]
    operands = [n for n in listed if example_shape(n) != (0,)]
    if len(operands) == 1:
        return Outcome(labels=labels_of(operands[0], labels))
    shape = example_shape(node)
    dim = normal_dim(call_argument(node, 1, "dim", 0), len(shape))
    along = [labels_of(operand, labels)[dim] for operand in operands]
    if not any(has_tokens(d) for d in along):
        require_plain(tuple(along), node)
        return broadcast(node, operands, labels, shape)
    axes = tuple(token_axis(d) for d in along)
    whole = _put_together(operands, axes, dim, labels)
    if whole is not None:
        return Outcome(labels=whole)
    return _join(node, operands, axes, dim, labels)


def _put_together(operands: list[fx.Node], axes: tuple[Axis | None, ...], dim: int, labels: LabelMap) -> Labels | None:
    """Labels of ``cat([f(x[:k]), g(x[k:])])``: the tokens of ``x`` again."""
    if len(operands) != 2 or axes[0] is not None or axes[1] is None:
        return None
    source = axes[1].source
    if not isinstance(source, tuple) or source[1] != "rest":
        return None
    prefix: Any = operands[0]
    while op_name(prefix) in ("to", "type_as", "contiguous", "clone", "_to_copy"):
        prefix = prefix.args[0]
    if op_name(prefix) != "slice" or call_argument(prefix, 3, "end", None) != source[2]:
        return None
    whole = labels_of(prefix.args[0], labels)
    if len(whole) <= dim or token_axis(whole[dim]) != Axis("tokens", source[0]):
        return None
    rest = labels_of(operands[1], labels)
    batch = next(f.axis for d in whole for f in d if f.axis is not None and f.axis.kind == "batch")
    return tuple(
        whole[d] if d == dim else tuple(Factor(batch if f.axis is not None else None, f.size) for f in one)
        for d, one in enumerate(rest)
    )


def _join(node: fx.Node, operands: list[fx.Node], axes: tuple[Axis | None, ...], dim: int, labels: LabelMap) -> Outcome:
    shape = example_shape(node)
    source = (tuple(None if a is None else a.source for a in axes), "join", node)
    every = [labels_of(n, labels) for n in operands]
    places = {batch_dim_of(own) for own, axis in zip(every, axes, strict=True) if axis is not None}
    if len(places) != 1 or any(has_tokens(d) for own in every for at, d in enumerate(own) if at != dim):
        raise AxisError("a concatenation of tokens whose batches do not agree")
    batch_dim = places.pop()
    result = [plain(n) for n in shape]
    result[batch_dim] = (Factor(Axis("batch", source), shape[batch_dim]),)
    axis = Axis("tokens", source)
    result[dim] = (Factor(axis, shape[dim]),)
    return Outcome(labels=tuple(result), readout=Readout("join", axis, dim, batch_dim))


def stack(node: fx.Node, labels: LabelMap) -> Outcome:
    """Operands of equal labels along a new dimension."""
    operands = list(node.args[0])  # type: ignore[arg-type]
    shape = example_shape(node)
    dim = normal_dim(call_argument(node, 1, "dim", 0), len(shape))
    inner = shape[:dim] + shape[dim + 1 :]
    outcome = broadcast(node, operands, labels, inner)
    assert outcome.labels is not None
    return Outcome(labels=(*outcome.labels[:dim], plain(len(operands)), *outcome.labels[dim:]), aligns=outcome.aligns)
