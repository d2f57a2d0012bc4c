"""Rules of operations that read a part of a dimension or reduce it; see ``table.py`` for the table.

Along a token axis these are the readouts; along the batch the token state is cut or repeated with the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriters.axes.labels import Axis, Dim, Factor, Labels, axes_of, dim_size, has_tokens, is_plain, plain, token_axis
from rewriters.axes.outcome import (
    Align,
    LabelMap,
    Outcome,
    Readout,
    batch_dim_of,
    labels_of,
    outer_batch,
    require_unlabelled,
    same_axes,
)
from rewriters.graph.node_record import record
from rewriters.graph.nodes import AxisError, call_argument, example_shape, example_size, normal_dim, op_name


def reduce(node: fx.Node, labels: LabelMap) -> Outcome:
    """A reduction; over a token axis it is a pooling readout."""
    own = labels_of(node.args[0], labels)
    position = 2 if op_name(node) in ("linalg_vector_norm", "norm") else 1
    dims = call_argument(node, position, "dim", None)
    if dims is None or dims == []:
        raise AxisError("a reduction over all dimensions")
    dims = [dims] if isinstance(dims, int) else list(dims)
    gone = {normal_dim(d, len(own)) for d in dims}
    keep = len(example_shape(node)) == len(own)
    rest = tuple(plain(1) if d in gone else dim for d, dim in enumerate(own) if keep or d not in gone)
    mixed = [d for d in gone if not is_plain(own[d])]
    if not mixed:
        return Outcome(labels=rest)
    axis = token_axis(own[mixed[0]])
    if len(gone) > 1 or axis is None or op_name(node) not in ("mean", "amax"):
        raise AxisError(f"{op_name(node)} over {axes_of(own[mixed[0]])}")
    return Outcome(labels=rest, readout=Readout("pool", axis, mixed[0], batch_dim_of(own)))


def masked_mean(node: fx.Node, labels: LabelMap) -> Outcome:
    """A weighted mean over one dimension; over a token axis it is pooling, the weights are a side input."""
    own = labels_of(node.args[0], labels)
    weights: Any = node.args[1]
    require_unlabelled([weights], labels, node)
    dim, keepdim = int(node.args[2]), bool(node.args[3])  # type: ignore[arg-type]
    rest = tuple(plain(1) if d == dim else x for d, x in enumerate(own) if keepdim or d != dim)
    if is_plain(own[dim]):
        raise AxisError("a masked mean beside a token axis")
    axis = token_axis(own[dim])
    if axis is None:
        raise AxisError(f"a masked mean over {axes_of(own[dim])}")
    return Outcome(labels=rest, readout=Readout("masked_mean", axis, dim, batch_dim_of(own)))


def select(node: fx.Node, labels: LabelMap) -> Outcome:
    """One index of a dimension; of a token axis it is a readout at a constant position."""
    own = labels_of(node.args[0], labels)
    dim = normal_dim(node.args[1], len(own))  # type: ignore[arg-type]
    rest = own[:dim] + own[dim + 1 :]
    if is_plain(own[dim]):
        return Outcome(labels=rest)
    axis = token_axis(own[dim])
    index = node.args[2]
    if axis is None or not isinstance(index, int):
        raise AxisError(f"a select along {axes_of(own[dim])} at {index}")
    return Outcome(labels=rest, readout=Readout("position", axis, dim, batch_dim_of(own), index))


_FAR = 1 << 40
# Mark of slices behind more special tokens than PREFIX (``canonicalise/special_slices.py``).
# A constant cut of at most so many tokens separates special tokens, which are protected; a longer one separates segments.
PREFIX = 8


def is_whole_end(end: Any, size: int) -> bool:
    """Whether a slice up to ``end`` takes the last of ``size`` entries."""
    return end is None or (isinstance(end, int) and (end > _FAR or end == size))


def slice_(node: fx.Node, labels: LabelMap) -> Outcome:
    """A range of a dimension; of a token axis the first tokens, or all but the first."""
    own = labels_of(node.args[0], labels)
    shape = example_shape(node)
    dim = normal_dim(call_argument(node, 1, "dim", 0), len(own))
    if is_plain(own[dim]):
        return Outcome(labels=(*own[:dim], plain(shape[dim]), *own[dim + 1 :]))
    start, end, step = (call_argument(node, i, n, d) for i, n, d in ((2, "start", 0), (3, "end", None), (4, "step", 1)))
    start = 0 if start is None else start
    size = dim_size(own[dim])
    whole_end = is_whole_end(end, size)
    if step == 1 and start == 0 and (whole_end or shape[dim] == size):
        return Outcome(labels=own)
    axis = token_axis(own[dim])
    if step != 1:
        raise AxisError(f"a slice [{start}:{end}:{step}] of {axes_of(own[dim])}")
    if axis is None:
        return _batch_part(node, own, dim, shape)
    special = record(node).special_cut
    if isinstance(start, int) and start > 0 and (start <= PREFIX or special) and whole_end:
        rest = (Factor(Axis("tokens", (axis.source, "rest", start)), size - start),)
        return Outcome(
            labels=(*own[:dim], rest, *own[dim + 1 :]), readout=Readout("rest", axis, dim, batch_dim_of(own), start)
        )
    if start == 0 and isinstance(end, int) and 0 < end < size and (end <= PREFIX or special):
        return Outcome(
            labels=(*own[:dim], plain(end), *own[dim + 1 :]),
            readout=Readout("prefix", axis, dim, batch_dim_of(own), end),
        )
    return _range(own, dim, axis, shape[dim], (start, None if whole_end else end))


def _range(own: Labels, dim: int, axis: Axis, size: int, bounds: tuple[Any, Any]) -> Outcome:
    """Tokens between two bounds: one token is a readout at a position, more are an axis of their own."""
    start = bounds[0]
    if size == 1 and isinstance(start, int):
        return Outcome(
            labels=(*own[:dim], plain(1), *own[dim + 1 :]),
            readout=Readout("position", axis, dim, batch_dim_of(own), start, keepdim=True),
        )
    part = (Factor(Axis("tokens", (axis.source, "range", *bounds)), size),)
    return Outcome(
        labels=(*own[:dim], part, *own[dim + 1 :]),
        readout=Readout("range", axis, dim, batch_dim_of(own), bounds=bounds),
    )


def repeat_interleave(node: fx.Node, labels: LabelMap) -> Outcome:
    """Each entry of a dimension a fixed number of times in a row; along the batch the token state is repeated too."""
    own = labels_of(node.args[0], labels)
    times, dim = node.args[1], call_argument(node, 2, "dim", None)
    if not isinstance(times, int) or dim is None:
        raise AxisError("repeat_interleave by a tensor or over all elements")
    dim = normal_dim(dim, len(own))
    shape = example_shape(node)
    if is_plain(own[dim]):
        return Outcome(labels=(*own[:dim], plain(shape[dim]), *own[dim + 1 :]))
    if has_tokens(own[dim]):
        raise AxisError("repeat_interleave along tokens")
    return _batch_part(node, own, dim, shape)


def _batch_part(node: fx.Node, own: Labels, dim: int, shape: tuple[int, ...]) -> Outcome:
    tokens = [a for d in own for a in axes_of(d) if a.kind == "tokens"]
    if len(set(tokens)) != 1 or len(own[dim]) != 1:
        raise AxisError("a slice of a batch that is folded or carries several token axes")
    return Outcome(
        labels=_batch_result(own, dim, tokens[0], _cut(node, 0), shape[dim]),
        readout=Readout("batch", tokens[0], dim, dim),
    )


def _cut(node: fx.Node, part: int) -> tuple[Any, ...]:
    """Identifies a part of a batch: equal cuts of one state get the same state."""
    return (op_name(node), str(node.args[1:]), part)


def _batch_result(own: Labels, dim: int, tokens: Axis, cut: tuple[Any, ...], size: int) -> Labels:
    source = (tokens.source, "part", cut)
    result: list[Dim] = []
    for position, label in enumerate(own):
        if position == dim:
            result.append((Factor(Axis("batch", source), size),))
        else:
            result.append(tuple(Factor(Axis("tokens", source), f.size) if f.axis == tokens else f for f in label))
    return tuple(result)


def split(node: fx.Node, labels: LabelMap) -> Outcome:
    """chunk, split, split_with_sizes, unbind: several results along one dimension."""
    own = labels_of(node.args[0], labels)
    name = op_name(node)
    dim = normal_dim(call_argument(node, 1 if name == "unbind" else 2, "dim", 0), len(own))
    values = node.meta["val"]
    if is_plain(own[dim]):
        if name == "unbind":
            rest = own[:dim] + own[dim + 1 :]
            return Outcome(results=tuple(rest for _ in values))
        sizes = [example_size(v.shape[dim]) for v in values]
        return Outcome(results=tuple((*own[:dim], plain(n), *own[dim + 1 :]) for n in sizes))
    if has_tokens(own[dim]) and name != "unbind":
        return _cuts(node, own, dim, [example_size(v.shape[dim]) for v in values])
    tokens = {a for d in own for a in axes_of(d) if a.kind == "tokens"}
    if has_tokens(own[dim]) or len(tokens) != 1 or len(own[dim]) != 1 or name == "unbind":
        raise AxisError(f"{name} along {axes_of(own[dim])} into {len(values)} parts")
    axis = tokens.pop()
    sizes = [example_size(v.shape[dim]) for v in values]
    results = tuple(_batch_result(own, dim, axis, _cut(node, part), n) for part, n in enumerate(sizes))
    return Outcome(results=results, readout=Readout("batch", axis, dim, dim, parts=tuple(sizes)))


def _cuts(node: fx.Node, own: Labels, dim: int, sizes: list[int]) -> Outcome:
    """Tokens cut into ranges, each an axis of its own."""
    axis = token_axis(own[dim])
    given = node.args[1] if isinstance(node.args[1], (list, tuple)) else sizes
    bounds: list[Any] = [0]
    for length in given[:-1]:
        if length != 0 and isinstance(bounds[-1], fx.Node):
            raise AxisError(f"{op_name(node)} along tokens at a border that depends on two sizes")
        bounds.append(length if bounds[-1] == 0 else bounds[-1] + length if isinstance(length, int) else None)
    if axis is None or None in bounds:
        raise AxisError(f"{op_name(node)} along tokens at a border that depends on two sizes")
    results = []
    for start, end, length in zip(bounds, [*bounds[1:], None], sizes, strict=True):
        part = (Factor(Axis("tokens", (axis.source, "range", start, end)), length),)
        results.append((*own[:dim], part, *own[dim + 1 :]))
    readout = Readout("cuts", axis, dim, batch_dim_of(own), bounds=tuple(bounds))
    return Outcome(results=tuple(results), readout=readout)


def getitem(node: fx.Node, labels: LabelMap) -> Outcome:
    """One of several results."""
    results = labels[node.args[0]]  # type: ignore[index]
    return Outcome(labels=results[node.args[1]])  # type: ignore[index, arg-type]


def index(node: fx.Node, labels: LabelMap) -> Outcome:
    """``x[arange(B), positions]``: one token of each sample, at a position given by the graph; of one other dimension
    entries of all tokens (``heads[:, :, [-1]]``)."""
    own = labels_of(node.args[0], labels)
    indices = list(node.args[1])  # type: ignore[arg-type]
    used = [d for d, i in enumerate(indices) if i is not None]
    require_unlabelled([i for i in indices if i is not None], labels, node)
    if all(is_plain(own[d]) for d in used):
        if len(used) != 1 or node.args[0] not in labels or indices[used[0]].meta["val"].dtype == torch.bool:
            raise AxisError("an index of several dimensions, or by a mask, beside a token axis")
        entries = tuple(plain(n) for n in example_shape(indices[used[0]]))
        return Outcome(labels=(*own[: used[0]], *entries, *own[used[0] + 1 :]))
    if used != [0, 1] or batch_dim_of(own) != 0 or token_axis(own[1]) is None:
        raise AxisError("an index that does not read one token a sample")
    rows, positions = indices
    if op_name(rows) != "arange" or len(example_shape(positions)) != 1 or len(example_shape(rows)) != 1:
        raise AxisError("an index that does not read one token a sample")
    axis = token_axis(own[1])
    assert axis is not None
    return Outcome(labels=(own[0], *own[2:]), readout=Readout("index", axis, 1, 0, index=positions))


def gather(node: fx.Node, labels: LabelMap) -> Outcome:
    """``x.gather(1, positions[:, None, None].expand(-1, 1, C))``: one token of each sample, at a position given by the
    graph; along other dimensions entries of the same tokens."""
    own, wanted = (labels_of(node.args[i], labels) for i in (0, 2))
    dim = normal_dim(node.args[1], len(own))  # type: ignore[arg-type]
    shape = example_shape(node)
    if is_plain(own[dim]):
        others = [d for d in range(len(own)) if d != dim]
        if not is_plain(wanted[dim]) or not all(_goes_along(own[d], wanted[d]) for d in others):
            raise AxisError("a gather whose index runs along other tokens than its values")
        result = tuple(plain(shape[d]) if d == dim else own[d] for d in range(len(own)))
        missing = [d for d in others if has_tokens(own[d]) and is_plain(wanted[d])]
        batch_dim, heads = outer_batch(own) if missing else (0, 1)
        aligns = [
            Align(node.args[2], d, axis, batch_dim, len(own), heads=heads)  # type: ignore[arg-type]
            for d in missing
            if (axis := token_axis(own[d])) is not None
        ]
        return Outcome(labels=result, aligns=tuple(aligns))
    axis, batch_dim = token_axis(own[dim]), batch_dim_of(own)
    positions: Any = node.args[2]
    require_unlabelled([positions], labels, node)
    while op_name(positions) in ("expand", "repeat", "unsqueeze", "view", "reshape", "to"):
        positions = positions.args[0]
    if axis is None or shape[dim] != 1 or example_shape(positions) != (shape[batch_dim],):
        raise AxisError("a gather along tokens that does not read one token a sample")
    return Outcome(
        labels=tuple(plain(1) if d == dim else label for d, label in enumerate(own)),
        readout=Readout("index", axis, dim, batch_dim, index=positions, keepdim=True),
    )


def _goes_along(values: Dim, index: Dim) -> bool:
    """Whether an index reads each entry of a dimension at its own place: a table [B, N] beside the values of N tokens does."""
    return same_axes(values, index) or (is_plain(index) and dim_size(index) == dim_size(values))


def size(node: fx.Node, labels: LabelMap) -> Outcome:
    """The size of a dimension; of a token axis the length that it was captured with."""
    own = labels_of(node.args[0], labels)
    dim = own[normal_dim(node.args[1], len(own))]  # type: ignore[arg-type]
    if not has_tokens(dim):
        return Outcome()
    axis = token_axis(dim)
    assert axis is not None
    return Outcome(readout=Readout("length", axis, normal_dim(node.args[1], len(own))))  # type: ignore[arg-type]
