"""Rules of operations that read a part of a dimension or reduce it; see ``table.py`` for the table.

Along a token axis these are the readouts; along the batch the token state is cut or repeated with the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from rewriters.axes.arguments import dim_argument, dims_argument, items
from rewriters.axes.labels import (
    Axis,
    Dim,
    Factor,
    LabelMap,
    Labels,
    ResultLabels,
    axes_of,
    dim_size,
    has_tokens,
    is_plain,
    plain,
    token_axis,
    unlabelled,
)
from rewriters.axes.outcome import Align, Outcome, require_unlabelled, same_axes
from rewriters.axes.readouts import (
    BatchReadout,
    IndexReadout,
    LengthReadout,
    MaskedMeanReadout,
    PoolingReadout,
    PositionReadout,
    PrefixReadout,
    RangeReadout,
    RangesReadout,
    RestReadout,
)
from rewriters.axes.sources import BatchPart, Rest, TokenRange
from rewriters.graph.match import because
from rewriters.graph.node_record import record
from rewriters.graph.nodes import AxisError, call_argument, example_shape, example_size, int_argument, op_name, operand
from rewriters.graph.op_sets import VECTOR_NORMS


def reduce(node: fx.Node, labels: LabelMap) -> Outcome:
    """A reduction; over a token axis it is a pooling readout."""
    own = labels.of(node.args[0])
    position = 2 if op_name(node) in VECTOR_NORMS else 1
    dims = dims_argument(node, position, len(own))
    if not dims:
        raise AxisError("a reduction over all dimensions")
    keep = len(example_shape(node)) == len(own)
    rest = Labels(plain(1) if d in dims else dim for d, dim in enumerate(own) if keep or d not in dims)
    mixed = [d for d in set(dims) if not is_plain(own[d])]
    if not mixed:
        return Outcome(labels=rest)
    axis = token_axis(own[mixed[0]])
    if len(set(dims)) > 1 or axis is None or op_name(node) not in ("mean", "amax"):
        raise AxisError(f"{op_name(node)} over {axes_of(own[mixed[0]])}{because(node)}")
    return Outcome(labels=rest, readout=PoolingReadout(axis=axis, dim=mixed[0], batch_dim=own.batch_dim()))


def masked_mean(node: fx.Node, labels: LabelMap) -> Outcome:
    """A weighted mean over one dimension; over a token axis it is pooling, the weights are a side input."""
    own = labels.of(node.args[0])
    require_unlabelled(node.args[1:2], labels, node)
    dim, keepdim = int_argument(node, 2, "dim"), bool(node.args[3])
    rest = Labels(plain(1) if d == dim else x for d, x in enumerate(own) if keepdim or d != dim)
    if is_plain(own[dim]):
        raise AxisError("a masked mean beside a token axis")
    axis = token_axis(own[dim])
    if axis is None:
        raise AxisError(f"a masked mean over {axes_of(own[dim])}")
    return Outcome(labels=rest, readout=MaskedMeanReadout(axis=axis, dim=dim, batch_dim=own.batch_dim()))


def select(node: fx.Node, labels: LabelMap) -> Outcome:
    """One index of a dimension; of a token axis it is a readout at a constant position."""
    own = labels.of(node.args[0])
    dim = dim_argument(node, 1, len(own))
    rest = own.without_dim(dim)
    if is_plain(own[dim]):
        return Outcome(labels=rest)
    axis = token_axis(own[dim])
    index = node.args[2]
    if axis is None or not isinstance(index, int):
        raise AxisError(f"a select along {axes_of(own[dim])} at {index}")
    readout = PositionReadout(axis=axis, dim=dim, batch_dim=own.batch_dim(), position=index)
    return Outcome(labels=rest, readout=readout)


_FAR = 1 << 40
# A constant cut of at most so many tokens separates special tokens, which are protected; a longer one separates segments.
PREFIX = 8


def is_whole_end(end: object, size: int) -> bool:
    """Whether a slice up to ``end`` takes the last of ``size`` entries."""
    return end is None or (isinstance(end, int) and (end > _FAR or end == size))


def slice_(node: fx.Node, labels: LabelMap) -> Outcome:
    """A range of a dimension; of a token axis the first tokens, or all but the first."""
    own = labels.of(node.args[0])
    shape = example_shape(node)
    dim = dim_argument(node, 1, len(own), default=0)
    if is_plain(own[dim]):
        return Outcome(labels=own.with_dim(dim, plain(shape[dim])))
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
        rest = Axis("tokens", Rest(axis.source, start))
        return Outcome(
            labels=own.with_dim(dim, (Factor(rest, size - start),)),
            readout=RestReadout(axis=axis, dim=dim, batch_dim=own.batch_dim(), start=start),
        )
    if start == 0 and isinstance(end, int) and 0 < end < size and (end <= PREFIX or special):
        return Outcome(
            labels=own.with_dim(dim, plain(end)),
            readout=PrefixReadout(axis=axis, dim=dim, batch_dim=own.batch_dim(), length=end),
        )
    tokens = TokenRange(axis.source, start, None if whole_end else end)
    return _range(own, dim, axis=axis, size=shape[dim], tokens=tokens)


def _range(own: Labels, dim: int, *, axis: Axis, size: int, tokens: TokenRange) -> Outcome:
    """Tokens between two bounds: one token is a readout at a position, more are an axis of their own."""
    batch_dim = own.batch_dim()
    if size == 1 and isinstance(tokens.start, int):
        return Outcome(
            labels=own.with_dim(dim, plain(1)),
            readout=PositionReadout(axis=axis, dim=dim, batch_dim=batch_dim, position=tokens.start, keepdim=True),
        )
    return Outcome(
        labels=own.with_dim(dim, (Factor(Axis("tokens", tokens), size),)),
        readout=RangeReadout(axis=axis, dim=dim, batch_dim=batch_dim, start=tokens.start, end=tokens.end),
    )


def repeat_interleave(node: fx.Node, labels: LabelMap) -> Outcome:
    """Each entry of a dimension a fixed number of times in a row; along the batch the token state is repeated too."""
    own = labels.of(node.args[0])
    times = node.args[1]
    if not isinstance(times, int) or call_argument(node, 2, "dim", None) is None:
        raise AxisError("repeat_interleave by a tensor or over all elements")
    dim = dim_argument(node, 2, len(own))
    shape = example_shape(node)
    if is_plain(own[dim]):
        return Outcome(labels=own.with_dim(dim, plain(shape[dim])))
    if has_tokens(own[dim]):
        raise AxisError("repeat_interleave along tokens")
    return _batch_part(node, own, dim, shape)


def _batch_part(node: fx.Node, own: Labels, dim: int, shape: tuple[int, ...]) -> Outcome:
    tokens = [a for d in own for a in axes_of(d) if a.kind == "tokens"]
    if len(set(tokens)) != 1 or len(own[dim]) != 1:
        raise AxisError("a slice of a batch that is folded or carries several token axes")
    labels = _part_labels(node, own, dim, tokens=tokens[0], number=0, size=shape[dim])
    return Outcome(labels=labels, readout=BatchReadout(axis=tokens[0], dim=dim))


def _part_labels(node: fx.Node, own: Labels, dim: int, *, tokens: Axis, number: int, size: int) -> Labels:
    """Labels of one part of a batch that ``node`` cuts or repeats."""
    source = BatchPart(tokens.source, op_name(node), str(node.args[1:]), number)
    result: list[Dim] = []
    for position, label in enumerate(own):
        if position == dim:
            result.append((Factor(Axis("batch", source), size),))
        else:
            result.append(tuple(Factor(Axis("tokens", source), f.size) if f.axis == tokens else f for f in label))
    return Labels(result)


def split(node: fx.Node, labels: LabelMap) -> Outcome:
    """chunk, split, split_with_sizes, unbind: several results along one dimension."""
    own = labels.of(node.args[0])
    name = op_name(node)
    dim = dim_argument(node, 1 if name == "unbind" else 2, len(own), default=0)
    values = node.meta["val"]
    if is_plain(own[dim]):
        if name == "unbind":
            return Outcome(labels=ResultLabels(own.without_dim(dim) for _ in values))
        sizes = [example_size(v.shape[dim]) for v in values]
        return Outcome(labels=ResultLabels(own.with_dim(dim, plain(n)) for n in sizes))
    if has_tokens(own[dim]) and name != "unbind":
        return _ranges(node, own, dim, [example_size(v.shape[dim]) for v in values])
    tokens = {a for d in own for a in axes_of(d) if a.kind == "tokens"}
    if has_tokens(own[dim]) or len(tokens) != 1 or len(own[dim]) != 1 or name == "unbind":
        raise AxisError(f"{name} along {axes_of(own[dim])} into {len(values)} parts")
    axis = tokens.pop()
    sizes = [example_size(v.shape[dim]) for v in values]
    results = ResultLabels(
        _part_labels(node, own, dim, tokens=axis, number=number, size=n) for number, n in enumerate(sizes)
    )
    return Outcome(labels=results, readout=BatchReadout(axis=axis, dim=dim, sizes=tuple(sizes)))


def _next_start(start: int | fx.Node, length: object) -> int | fx.Node | None:
    """Where the range behind one of ``length`` tokens begins; None if that depends on two sizes."""
    if start == 0 and isinstance(length, (int, fx.Node)):
        return length
    return start + length if isinstance(start, int) and isinstance(length, int) else None


def _ranges(node: fx.Node, own: Labels, dim: int, sizes: list[int]) -> Outcome:
    """Tokens cut into consecutive ranges, each an axis of its own."""
    axis = token_axis(own[dim])
    given: Sequence[object] = node.args[1] if isinstance(node.args[1], (list, tuple)) else sizes
    starts: list[int | fx.Node] = [0]
    for length in given[:-1]:
        start = _next_start(starts[-1], length)
        if start is None:
            raise AxisError(f"{op_name(node)} along tokens at a border that depends on two sizes")
        starts.append(start)
    if axis is None:
        raise AxisError(f"{op_name(node)} along tokens at a border that depends on two sizes")
    results = []
    for start, end, length in zip(starts, [*starts[1:], None], sizes, strict=True):
        part = Axis("tokens", TokenRange(axis.source, start, end))
        results.append(own.with_dim(dim, (Factor(part, length),)))
    readout = RangesReadout(axis=axis, dim=dim, batch_dim=own.batch_dim(), starts=tuple(starts))
    return Outcome(labels=ResultLabels(results), readout=readout)


def getitem(node: fx.Node, labels: LabelMap) -> Outcome:
    """One of several results."""
    results = labels[operand(node, 0)]
    if not isinstance(results, ResultLabels):
        raise TypeError(f"{node.args[0]} has one result")
    return Outcome(labels=results[int_argument(node, 1, "index")])


def index(node: fx.Node, labels: LabelMap) -> Outcome:
    """``x[arange(B), positions]``: one token of each sample, at a position given by the graph; of one other dimension
    entries of all tokens (``heads[:, :, [-1]]``)."""
    own = labels.of(node.args[0])
    indices = items(node, 1)
    used = [d for d, i in enumerate(indices) if i is not None]
    require_unlabelled(indices, labels, node)
    if all(is_plain(own[d]) for d in used):
        chosen = indices[used[0]] if len(used) == 1 else None
        if not isinstance(chosen, fx.Node) or node.args[0] not in labels or chosen.meta["val"].dtype == torch.bool:
            raise AxisError("an index of several dimensions, or by a mask, beside a token axis")
        return Outcome(labels=Labels((*own[: used[0]], *unlabelled(example_shape(chosen)), *own[used[0] + 1 :])))
    axis = token_axis(own[1]) if used == [0, 1] and own.batch_dim() == 0 else None
    rows, positions = indices[0], indices[-1]
    if axis is None or len(indices) != 2 or not isinstance(rows, fx.Node) or not isinstance(positions, fx.Node):
        raise AxisError("an index that does not read one token a sample")
    if op_name(rows) != "arange" or len(example_shape(positions)) != 1 or len(example_shape(rows)) != 1:
        raise AxisError("an index that does not read one token a sample")
    readout = IndexReadout(axis=axis, dim=1, batch_dim=0, index=positions)
    return Outcome(labels=own.without_dim(1), readout=readout)


def gather(node: fx.Node, labels: LabelMap) -> Outcome:
    """``x.gather(1, positions[:, None, None].expand(-1, 1, C))``: one token of each sample, at a position given by the
    graph; along other dimensions entries of the same tokens."""
    own, wanted = (labels.of(node.args[i]) for i in (0, 2))
    dim = dim_argument(node, 1, len(own))
    shape = example_shape(node)
    if is_plain(own[dim]):
        return _gather_entries(node, own, wanted, dim)
    axis, batch_dim = token_axis(own[dim]), own.batch_dim()
    positions = operand(node, 2)
    require_unlabelled([positions], labels, node)
    while op_name(positions) in ("expand", "repeat", "unsqueeze", "view", "reshape", "to"):
        positions = operand(positions, 0)
    if axis is None or shape[dim] != 1 or example_shape(positions) != (shape[batch_dim],):
        raise AxisError("a gather along tokens that does not read one token a sample")
    return Outcome(
        labels=own.with_dim(dim, plain(1)),
        readout=IndexReadout(axis=axis, dim=dim, batch_dim=batch_dim, index=positions, keepdim=True),
    )


def _gather_entries(node: fx.Node, own: Labels, wanted: Labels, dim: int) -> Outcome:
    """Entries of a dimension that runs along no axis; the index is aligned with the tokens of the values."""
    others = [d for d in range(len(own)) if d != dim]
    if not is_plain(wanted[dim]) or not all(_goes_along(own[d], wanted[d]) for d in others):
        raise AxisError("a gather whose index runs along other tokens than its values")
    shape = example_shape(node)
    result = Labels(plain(shape[d]) if d == dim else own[d] for d in range(len(own)))
    missing = [d for d in others if has_tokens(own[d]) and is_plain(wanted[d])]
    batch_dim, heads = own.batch_and_heads() if missing else (0, 1)
    aligns = [
        Align(operand=operand(node, 2), dim=d, axis=axis, batch_dim=batch_dim, rank=len(own), heads=heads)
        for d in missing
        if (axis := token_axis(own[d])) is not None
    ]
    return Outcome(labels=result, aligns=tuple(aligns))


def _goes_along(values: Dim, index: Dim) -> bool:
    """Whether an index reads each entry of a dimension at its own place: a table [B, N] beside the values of N tokens does."""
    return same_axes(values, index) or (is_plain(index) and dim_size(index) == dim_size(values))


def size(node: fx.Node, labels: LabelMap) -> Outcome:
    """The size of a dimension; of a token axis the length that it was captured with."""
    own = labels.of(node.args[0])
    dim = dim_argument(node, 1, len(own))
    if not has_tokens(own[dim]):
        return Outcome()
    axis = token_axis(own[dim])
    assert axis is not None
    return Outcome(readout=LengthReadout(axis=axis, dim=dim))
