"""The rule table: how axis labels move through each ATen operation.

Start at :data:`RULES`, one row per operation, and :func:`apply`. A rule is a function from a node and the labels of
its inputs to an :class:`Outcome`: labels of the result, and the repairs that keep the operation correct once token
axes are shorter than they were captured (side inputs to align, baked-in sizes to replace, readouts to remap). Rules
decide nothing else and change nothing; ``insert.py`` carries the repairs out, ``detect.py`` only reads the labels and
readouts. An operation without a row, or a row that does not cover the labelled dimension, raises :class:`AxisError`:
it is never taken for element-wise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from madtp.attention import attention
from rewriters.axes import (
    Axis,
    AxisError,
    Dim,
    Factor,
    Labels,
    any_tokens,
    axes_of,
    dim_size,
    example_shape,
    example_size,
    has_tokens,
    is_plain,
    is_tensor,
    normal_dim,
    plain,
    relabel_view,
    token_axis,
    unlabelled,
)


@dataclass(frozen=True)
class Align:
    """Gather ``operand`` along ``dim`` (counted in the broadcast result) so that it runs along ``axis``."""

    operand: fx.Node
    dim: int
    axis: Axis
    batch_dim: int
    rank: int
    present: Axis | None = None


@dataclass(frozen=True)
class Resize:
    """The size argument ``position`` of ``args[argument]`` becomes the present length of ``axis`` (-1: inferred)."""

    argument: int
    position: int
    axis: Axis | None


@dataclass(frozen=True)
class Readout:
    """A place where a token axis ends.

    kind: "position" (constant index), "prefix" (the first tokens), "rest" (all but the first), "index" (a graph value
    per sample), "pool" (mean, amax over tokens), "masked_mean", "length" (the size of the axis), "batch" (a slice of the batch;
    the axis goes on).
    """

    kind: Literal["position", "prefix", "rest", "index", "pool", "masked_mean", "length", "batch"]
    axis: Axis
    dim: int
    batch_dim: int | None = None
    position: int = 0
    index: fx.Node | None = None
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a rule says: labels of the result (a tuple of labels for several results) and the repairs."""

    labels: Labels | None = None
    results: tuple[Labels, ...] | None = None
    aligns: tuple[Align, ...] = ()
    resizes: tuple[Resize, ...] = ()
    readout: Readout | None = None
    states: Mapping[str, Axis] = field(default_factory=dict)


LabelMap = Mapping[fx.Node, Labels | tuple[Labels, ...]]
Rule = Callable[[fx.Node, LabelMap], Outcome]


def labels_of(node: Any, labels: LabelMap) -> Labels:
    """Labels of a tensor operand; an operand that was never labelled runs along no axis."""
    known = labels.get(node)
    if known is not None:
        return known  # type: ignore[return-value]
    return unlabelled(example_shape(node))


def op_name(node: fx.Node) -> str:
    """Name of the operation without overload: "add", "layer_norm", "getitem", "attention"."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet.__name__)
    return str(getattr(target, "__name__", target))


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Operands that are tensors, in order."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def batch_dim_of(labels: Labels) -> int:
    """The dimension that is the batch; raises if there is none or it is folded with others."""
    for position, dim in enumerate(labels):
        if any(a.kind == "batch" for a in axes_of(dim)):
            if len(dim) > 1:
                raise AxisError("the batch is folded together with other dimensions")
            return position
    raise AxisError("a token axis stands without its batch")


def _same_axes(first: Dim, second: Dim) -> bool:
    kinds = [
        tuple(f.axis if f.axis is None or f.axis.kind == "tokens" else f.axis.kind for f in d) for d in (first, second)
    ]
    return kinds[0] == kinds[1]


def broadcast(
    node: fx.Node, operands: list[fx.Node], labels: LabelMap, shape: tuple[int, ...], skip: int = 0
) -> Outcome:
    """Element-wise combination of ``operands`` with broadcasting to ``shape``; the last ``skip`` dimensions are left
    out."""
    rank = len(shape)
    merged: list[Dim] = [plain(n) for n in shape]
    per_operand = {n: labels_of(n, labels) for n in operands}
    for own in per_operand.values():
        for offset in range(1 + skip, len(own) + 1):
            dim = own[-offset]
            if not is_plain(dim):
                merged[rank - offset] = _merge(merged[rank - offset], dim, labels)
    aligns: list[Align] = []
    for operand, own in per_operand.items():
        for offset in range(1 + skip, len(own) + 1):
            target, dim = merged[rank - offset], own[-offset]
            if not has_tokens(target) or dim_size(dim) == 1:
                continue
            if is_plain(dim):
                axis = token_axis(target)
                assert axis is not None
                aligns.append(Align(operand, rank - offset, axis, _batch_position(merged), rank))
            elif not _same_axes(dim, target):
                old, new = token_axis(dim), token_axis(target)
                assert new is not None
                aligns.append(Align(operand, rank - offset, new, _batch_position(merged), rank, present=old))
    return Outcome(labels=tuple(merged), aligns=tuple(aligns))


def _batch_position(merged: list[Dim]) -> int:
    return batch_dim_of(tuple(merged))


def _merge(first: Dim, second: Dim, labels: LabelMap) -> Dim:
    """Labels of a dimension that two operands share; the newer state of one stream wins."""
    if is_plain(first):
        return second
    if _same_axes(first, second):
        return first
    old, new = token_axis(first), token_axis(second)
    if old is None or new is None:
        raise AxisError(f"a dimension runs along {axes_of(first)} in one operand and {axes_of(second)} in another")
    lineage = getattr(labels, "newer", None)
    winner = lineage(old, new) if lineage is not None else None
    if winner is None:
        raise AxisError(f"two token axes that have nothing to do with each other meet ({old} and {new})")
    return first if winner == old else second


def elementwise(node: fx.Node, labels: LabelMap) -> Outcome:
    """Each element of the result depends on the elements at the same (broadcast) place only."""
    return broadcast(node, tensor_operands(node), labels, example_shape(node))


def like_first(node: fx.Node, labels: LabelMap) -> Outcome:
    """The first operand's values in another type; of the second only its type is read."""
    return Outcome(labels=labels_of(node.args[0], labels))


def prelu(node: fx.Node, labels: LabelMap) -> Outcome:
    """A slope for each entry of dimension 1, or one for all."""
    own, weight = labels_of(node.args[0], labels), node.args[1]
    _require_unlabelled([weight], labels, node)  # type: ignore[list-item]
    if dim_size(unlabelled(example_shape(weight))[0]) > 1:  # type: ignore[arg-type]
        _require_plain(own[1:2], node)
    return Outcome(labels=own)


def last_dims(count: Callable[[fx.Node], int]) -> Rule:
    """Mixes the last ``count`` dimensions of the first operand, leaves the others alone; the result keeps the shape."""

    def rule(node: fx.Node, labels: LabelMap) -> Outcome:
        own = labels_of(node.args[0], labels)
        mixed = count(node)
        _require_plain(own[len(own) - mixed :], node)
        _require_unlabelled(tensor_operands(node)[1:], labels, node)
        return Outcome(labels=own)

    return rule


def linear(node: fx.Node, labels: LabelMap) -> Outcome:
    """``[..., C] -> [..., C']``."""
    own = labels_of(node.args[0], labels)
    _require_plain(own[-1:], node)
    _require_unlabelled(tensor_operands(node)[1:], labels, node)
    return Outcome(labels=(*own[:-1], plain(example_shape(node)[-1])))


def matmul(node: fx.Node, labels: LabelMap) -> Outcome:
    """Contraction over a dimension that runs along no axis; batch dimensions broadcast."""
    first, second = (labels_of(node.args[i], labels) for i in (0, 1))
    if len(first) < 2 or len(second) < 2:
        raise AxisError("a matrix product with a vector")
    _require_plain((first[-1], second[-2]), node)
    outer = broadcast(node, list(node.args[:2]), labels, example_shape(node), skip=2)  # type: ignore[arg-type]
    assert outer.labels is not None
    return Outcome(labels=(*outer.labels[:-2], first[-2], second[-1]), aligns=outer.aligns)


def along(default: int, argument: int = 1, name: str = "dim") -> Rule:
    """Mixes one dimension (softmax, cumsum): it must run along no axis."""

    def rule(node: fx.Node, labels: LabelMap) -> Outcome:
        own = labels_of(node.args[0], labels)
        dim = _argument(node, argument, name, default)
        _require_plain((own[normal_dim(dim, len(own))],), node)
        return Outcome(labels=own)

    return rule


def reduce(node: fx.Node, labels: LabelMap) -> Outcome:
    """A reduction; over a token axis it is a pooling readout."""
    own = labels_of(node.args[0], labels)
    position = 2 if op_name(node) in ("linalg_vector_norm", "norm") else 1
    dims = _argument(node, position, "dim", None)
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
    dims = _argument(node, 1, "dim", None)
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


def expand(node: fx.Node, labels: LabelMap) -> Outcome:
    """Dimensions of size 1 are repeated without a copy; others keep their size."""
    own = labels_of(node.args[0], labels)
    shape = example_shape(node)
    new = len(shape) - len(own)
    result = tuple(plain(n) if d < new or is_plain(own[d - new]) else own[d - new] for d, n in enumerate(shape))
    return Outcome(labels=result, resizes=tuple(Resize(1, d, None) for d, dim in enumerate(result) if has_tokens(dim)))


def repeat(node: fx.Node, labels: LabelMap) -> Outcome:
    """Copies along dimensions that run along no axis."""
    own = labels_of(node.args[0], labels)
    times = list(node.args[1])  # type: ignore[arg-type]
    new = len(times) - len(own)
    shape = example_shape(node)
    for dim, count in zip(own, times[new:], strict=True):
        if not is_plain(dim) and count != 1:
            raise AxisError(f"repeat along {axes_of(dim)}")
    return Outcome(
        labels=tuple(plain(n) if d < new or is_plain(own[d - new]) else own[d - new] for d, n in enumerate(shape))
    )


def repeat_interleave(node: fx.Node, labels: LabelMap) -> Outcome:
    """Each entry of a dimension a fixed number of times in a row; along the batch the token state is repeated too."""
    own = labels_of(node.args[0], labels)
    times, dim = node.args[1], _argument(node, 2, "dim", None)
    if not isinstance(times, int) or dim is None:
        raise AxisError("repeat_interleave by a tensor or over all elements")
    dim = normal_dim(dim, len(own))
    shape = example_shape(node)
    if is_plain(own[dim]):
        return Outcome(labels=(*own[:dim], plain(shape[dim]), *own[dim + 1 :]))
    if has_tokens(own[dim]):
        raise AxisError("repeat_interleave along tokens")
    return _batch_part(node, own, dim, shape)


def cat(node: fx.Node, labels: LabelMap) -> Outcome:
    """Concatenation along a dimension that runs along no axis; the other dimensions must agree."""
    # torch lets an empty vector stand for "nothing" in a concatenation.
    listed: Any = node.args[0]
    operands = [n for n in listed if example_shape(n) != (0,)]
    shape = example_shape(node)
    dim = normal_dim(_argument(node, 1, "dim", 0), len(shape))
    for operand in operands:
        _require_plain((labels_of(operand, labels)[dim],), node)
    outcome = broadcast(node, operands, labels, shape)
    assert outcome.labels is not None
    return outcome


def stack(node: fx.Node, labels: LabelMap) -> Outcome:
    """Operands of equal labels along a new dimension."""
    operands = list(node.args[0])  # type: ignore[arg-type]
    shape = example_shape(node)
    dim = normal_dim(_argument(node, 1, "dim", 0), len(shape))
    inner = shape[:dim] + shape[dim + 1 :]
    outcome = broadcast(node, operands, labels, inner)
    assert outcome.labels is not None
    return Outcome(labels=(*outcome.labels[:dim], plain(len(operands)), *outcome.labels[dim:]), aligns=outcome.aligns)


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


def slice_(node: fx.Node, labels: LabelMap) -> Outcome:
    """A range of a dimension; of a token axis the first tokens, or all but the first."""
    own = labels_of(node.args[0], labels)
    shape = example_shape(node)
    dim = normal_dim(_argument(node, 1, "dim", 0), len(own))
    if is_plain(own[dim]):
        return Outcome(labels=(*own[:dim], plain(shape[dim]), *own[dim + 1 :]))
    start, end, step = (_argument(node, i, n, d) for i, n, d in ((2, "start", 0), (3, "end", None), (4, "step", 1)))
    start = 0 if start is None else start
    size = dim_size(own[dim])
    whole_end = end is None or (isinstance(end, int) and end > _FAR) or (isinstance(end, int) and end == size)
    if step == 1 and start == 0 and (whole_end or shape[dim] == size):
        return Outcome(labels=own)
    axis = token_axis(own[dim])
    if axis is None or step != 1 or not isinstance(start, int):
        if axis is None and step == 1:
            return _batch_part(node, own, dim, shape)
        raise AxisError(f"a slice [{start}:{end}:{step}] of {axes_of(own[dim])}")
    if start > 0 and whole_end:
        rest = (Factor(Axis("tokens", (axis.source, "rest", start)), size - start),)
        return Outcome(
            labels=(*own[:dim], rest, *own[dim + 1 :]), readout=Readout("rest", axis, dim, batch_dim_of(own), start)
        )
    if start == 0 and isinstance(end, int) and 0 < end < size:
        return Outcome(
            labels=(*own[:dim], plain(end), *own[dim + 1 :]),
            readout=Readout("prefix", axis, dim, batch_dim_of(own), end),
        )
    raise AxisError(f"a slice [{start}:{end}] from the middle of a token axis")


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
    dim = normal_dim(_argument(node, 1 if name == "unbind" else 2, "dim", 0), len(own))
    values = node.meta["val"]
    if is_plain(own[dim]):
        if name == "unbind":
            rest = own[:dim] + own[dim + 1 :]
            return Outcome(results=tuple(rest for _ in values))
        sizes = [example_size(v.shape[dim]) for v in values]
        return Outcome(results=tuple((*own[:dim], plain(n), *own[dim + 1 :]) for n in sizes))
    tokens = {a for d in own for a in axes_of(d) if a.kind == "tokens"}
    if has_tokens(own[dim]) or len(tokens) != 1 or len(own[dim]) != 1 or name == "unbind":
        raise AxisError(f"{name} along {axes_of(own[dim])} into {len(values)} parts")
    axis = tokens.pop()
    sizes = [example_size(v.shape[dim]) for v in values]
    results = tuple(_batch_result(own, dim, axis, _cut(node, part), n) for part, n in enumerate(sizes))
    return Outcome(results=results, readout=Readout("batch", axis, dim, dim, parts=tuple(sizes)))


def getitem(node: fx.Node, labels: LabelMap) -> Outcome:
    """One of several results."""
    results = labels[node.args[0]]  # type: ignore[index]
    return Outcome(labels=results[node.args[1]])  # type: ignore[index, arg-type]


def index(node: fx.Node, labels: LabelMap) -> Outcome:
    """``x[arange(B), positions]``: one token of each sample, at a position given by the graph."""
    own = labels_of(node.args[0], labels)
    indices = list(node.args[1])  # type: ignore[arg-type]
    used = [d for d, i in enumerate(indices) if i is not None]
    _require_unlabelled([i for i in indices if i is not None], labels, node)
    if all(is_plain(own[d]) for d in used):
        raise AxisError("an index beside a token axis")
    if used != [0, 1] or batch_dim_of(own) != 0 or token_axis(own[1]) is None:
        raise AxisError("an index that does not read one token a sample")
    rows, positions = indices
    if op_name(rows) != "arange" or len(example_shape(positions)) != 1 or len(example_shape(rows)) != 1:
        raise AxisError("an index that does not read one token a sample")
    axis = token_axis(own[1])
    assert axis is not None
    return Outcome(labels=(own[0], *own[2:]), readout=Readout("index", axis, 1, 0, index=positions))


def embedding(node: fx.Node, labels: LabelMap) -> Outcome:
    """A row of the table for each index."""
    _require_unlabelled([node.args[0]], labels, node)  # type: ignore[list-item]
    own = labels_of(node.args[1], labels)
    return Outcome(labels=(*own, plain(example_shape(node)[-1])))


def size(node: fx.Node, labels: LabelMap) -> Outcome:
    """The size of a dimension; of a token axis the length that it was captured with."""
    own = labels_of(node.args[0], labels)
    dim = own[normal_dim(node.args[1], len(own))]  # type: ignore[arg-type]
    if not has_tokens(dim):
        return Outcome()
    axis = token_axis(dim)
    assert axis is not None
    return Outcome(readout=Readout("length", axis, normal_dim(node.args[1], len(own))))  # type: ignore[arg-type]


def attend(node: fx.Node, labels: LabelMap) -> Outcome:
    """Attention: the result runs along the queries; masks are aligned by the states of queries and keys."""
    query, key, value = (labels_of(node.args[i], labels) for i in range(3))
    _require_plain((query[1], query[3], key[1], key[3], value[3]), node)
    mask = node.args[3] if len(node.args) > 3 else None
    if isinstance(mask, fx.Node) and mask in labels and any_tokens(labels_of(mask, labels)):
        raise AxisError("an attention mask that is computed from pruned tokens")
    states = {}
    for name, own in (("query_state", query), ("key_state", key)):
        axis = token_axis(own[2])
        if axis is not None:
            states[name] = axis
    if has_tokens(key[2]) and token_axis(value[2]) != token_axis(key[2]):
        raise AxisError("keys and values run along different tokens")
    batch = query[0] if not is_plain(query[0]) else key[0]
    return Outcome(labels=(batch, query[1], query[2], value[3]), states=states)


def masked_mean(node: fx.Node, labels: LabelMap) -> Outcome:
    """A weighted mean over one dimension; over a token axis it is pooling, the weights are a side input."""
    own = labels_of(node.args[0], labels)
    weights: Any = node.args[1]
    _require_unlabelled([weights], labels, node)
    dim, keepdim = int(node.args[2]), bool(node.args[3])  # type: ignore[arg-type]
    rest = tuple(plain(1) if d == dim else x for d, x in enumerate(own) if keepdim or d != dim)
    if is_plain(own[dim]):
        raise AxisError("a masked mean beside a token axis")
    axis = token_axis(own[dim])
    if axis is None:
        raise AxisError(f"a masked mean over {axes_of(own[dim])}")
    return Outcome(labels=rest, readout=Readout("masked_mean", axis, dim, batch_dim_of(own)))


def _require_plain(dims: tuple[Dim, ...], node: fx.Node) -> None:
    for dim in dims:
        if not is_plain(dim):
            raise AxisError(f"{op_name(node)} mixes values along {axes_of(dim)[0].kind}")


def _require_unlabelled(operands: list[fx.Node], labels: LabelMap, node: fx.Node) -> None:
    for operand in operands:
        if is_tensor(operand) and operand in labels and not all(is_plain(d) for d in labels_of(operand, labels)):
            raise AxisError(f"{op_name(node)} takes {operand.name}, which runs along tokens, as a parameter")


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


_ELEMENTWISE = """
abs add addcmul alias atan2 bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip
clone contiguous copysign cos detach div dropout elu eq erf exp expm1 floor floor_divide fmod full_like ge gelu gt
hardsigmoid hardswish hardtanh isinf isnan le leaky_relu lerp log log1p log2 logical_and logical_not logical_or
logical_xor lt masked_fill maximum minimum mish mod mul nan_to_num ne neg ones_like pow reciprocal relu relu6
remainder round rsqrt rsub selu sigmoid sign silu sin softplus sqrt square sub tan tanh true_divide where xlogy
zeros_like __and__ __or__ __xor__
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float"), like_first),
    "prelu": prelu,
    "attention": attend,
    "masked_mean": masked_mean,
    "linear": linear,
    "matmul": matmul,
    "bmm": matmul,
    "layer_norm": last_dims(lambda node: len(node.args[1])),  # type: ignore[arg-type]
    "rms_norm": last_dims(lambda node: len(node.args[1])),  # type: ignore[arg-type]
    "softmax": along(-1),
    "log_softmax": along(-1),
    "cumsum": along(-1),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "any", "all", "linalg_vector_norm", "norm"), reduce),
    **dict.fromkeys(("transpose", "t", "mT"), transpose),
    "permute": permute,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), view),
    "expand": expand,
    "expand_as": elementwise,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "cat": cat,
    "concat": cat,
    "stack": stack,
    "select": select,
    "slice": slice_,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unbind"), split),
    operator.getitem.__name__: getitem,
    "index": index,
    "embedding": embedding,
    "sym_size": size,
}

assert attention.__name__ in RULES


def apply(node: fx.Node, labels: LabelMap) -> Outcome:
    """The outcome of ``node`` under ``labels``; raises :class:`AxisError` if no rule covers it."""
    if node.op != "call_function":
        raise AxisError(f"a {node.op} node")
    rule = RULES.get(op_name(node))
    if rule is None:
        raise AxisError(f"no rule for the operation {op_name(node)}")
    try:
        return rule(node, labels)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        # A form of the call that the rule was not written for: refuse it, whatever its arguments look like.
        raise AxisError(f"the rule of {op_name(node)} does not cover this form of it ({error})") from error
