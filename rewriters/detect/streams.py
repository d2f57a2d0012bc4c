"""Detect: residual streams, attention sublayers, modalities and readouts of a canonical graph.

Start at :func:`detect`. From each attention node the walk goes back to the residual value that its queries come from and
forward to the residual add. What the sublayers of one chain share is a *stream*. Nothing here knows any architecture: the
evidence is where axis labels go (``axes/propagate.py``) and which inputs a stream descends from. ``structure.py`` has the
result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from rewriters.axes.arguments import operand_list
from rewriters.axes.labels import Dim, dim_size, seed, token_axis
from rewriters.axes.outcome import query_and_key
from rewriters.axes.propagate import propagate
from rewriters.axes.readouts import BatchReadout
from rewriters.axes.sources import Concatenation
from rewriters.canonicalise.attention import PLAIN_SPELLING, SDPA, is_unrecognised, weighs_indirectly
from rewriters.canonicalise.attention_maps import map_miss
from rewriters.detect.layout import find_layout
from rewriters.detect.modality import is_pooled_by_layer, is_pooling, special_positions, stream_modality
from rewriters.detect.structure import TOKEN_DIMS, Stream, Structure, Sublayer, Unplaced
from rewriters.detect.windows import AttentionSpan, has_mixed_keys, scores_on_grid
from rewriters.graph.dependencies import is_learned
from rewriters.graph.match import Miss, because, nearest_miss
from rewriters.graph.nodes import (
    AxisError,
    example_shape,
    is_attention,
    is_tensor,
    module_path,
    op_name,
    operand,
    tensor_operands,
)
from rewriters.graph.op_sets import ADDS, CONCATENATIONS, MAKERS, NORMS, RESIDUAL_STEPS, SPLITS
from rewriters.graph.residual import gets_values_from, residual_of
from rewriters.graph.walk import ancestors, positions

UNKNOWN_SPELLING = "attention in a spelling that the rewriter does not know"
ON_A_STREAM = "attention on a residual stream x + f(x) of shape [B, N, C]"
# Operations that a residual value may pass between blocks of one stream; parts of its tokens are put together again.
CHAIN = ADDS | NORMS | RESIDUAL_STEPS | SPLITS | CONCATENATIONS | {"slice", "getitem"}


def detect(graph: fx.Graph) -> Structure:
    """Find sublayers, streams and readouts; what could not be placed is listed with the reason."""
    nodes = list(graph.nodes)
    order = positions(graph)
    found = Structure(graph, [], [], [], [])
    for node in nodes:
        if is_unrecognised(node) or weighs_indirectly(node):
            if op_name(node) != SDPA and is_pooled_by_layer(node):
                found.pooling.append(node)
            else:
                found.unplaced.append(_unrecognised(node, nearest_miss(node), order))
        if not is_attention(node):
            continue
        try:
            sublayer = _sublayer(node, nodes, order)
            stream = _stream_of(sublayer, found.streams)
            if stream is None and sublayer.kind == "self":
                stream = _open_stream(sublayer, len(found.streams), nodes, order)
                found.streams.append(stream)
            if stream is None:
                raise AxisError("cross-attention whose queries come from no stream with self-attention")
            sublayer.stream = stream.index
            sublayer.source = _source_of(node, found.streams) if sublayer.kind == "cross" else None
        except AxisError as error:
            by_layer = op_name(node) == "weigh" and is_pooled_by_layer(operand(node))
            if by_layer or is_pooling(node):
                found.pooling.append(node)
            else:
                found.unplaced.append(_misplaced(node, str(error), order))
            continue
        stream.sublayers.append(sublayer)
        found.sublayers.append(sublayer)
    return found


def _unrecognised(attention: fx.Node, miss: Miss | None, order: dict[fx.Node, int]) -> Unplaced:
    """Attention in an unknown spelling, with the nearest miss of the search for a known one."""
    if miss is None:
        return Unplaced(attention, attention, UNKNOWN_SPELLING, PLAIN_SPELLING)
    # Later passes may have replaced the node.
    node = miss.node if miss.node in order else attention
    return Unplaced(attention, node, f"{UNKNOWN_SPELLING}: {miss}", miss.help)


def _misplaced(attention: fx.Node, reason: str, order: dict[fx.Node, int]) -> Unplaced:
    """Attention that belongs to no stream. An attention map in an unusual spelling may be the reason."""
    miss = map_miss(attention) if op_name(attention) == "weigh" else None
    if miss is None:
        nearest = nearest_miss(attention)
        return Unplaced(attention, attention, reason, ON_A_STREAM if nearest is None else nearest.help)
    unknown = _unrecognised(attention, miss, order)
    return Unplaced(attention, unknown.node, f"{unknown.reason}; as it is spelled, {reason}", miss.help)


def _sublayer(node: fx.Node, nodes: list[fx.Node], order: dict[fx.Node, int]) -> Sublayer:
    residual = residual_of(node)
    block_input = residual.before
    shape = example_shape(block_input)
    if len(shape) != 3:
        needed = f"[B, N, C], [N, B, C] or [B, C, N] is needed{because(node)}"
        raise AxisError(f"its residual stream has {len(shape)} dimensions; {needed}")
    between = nodes[order[block_input] + 1 : order[node]]
    behind = _value_behind(residual.after, node, block_input)
    value = behind.value
    if example_shape(value) != shape:
        raise AxisError("the residual stream changes its shape")
    path = _path(node, residual.after)
    span = AttentionSpan(nodes, block_input, node, value)
    blocked: list[list[str]] = []
    for dims in TOKEN_DIMS:
        flow = propagate(between, {block_input: seed(shape, *dims, "probe")})
        blocked.append(list(flow.blocked.values()))
        query, key = query_and_key(node, flow.labels)
        try:
            if token_axis(query) is None:
                continue
            kind: Literal["self", "cross"] = "self" if token_axis(query) == token_axis(key) else "cross"
        except AxisError:
            continue
        length = shape[dims.token_dim]
        if token_axis(key) is not None and length not in (dim_size(query), dim_size(key)):
            windows = f"windows of {dim_size(query)} of its {length} tokens"
            raise AxisError(f"it attends within {windows}, in calls that are not joined{because(node)}")
        if kind == "cross" and (has_mixed_keys(span, dims) or _has_learned_keys(query, key)):
            return Sublayer(
                node, "self", block_input, value, behind.norm, dims.token_dim, dims.batch_dim, path, scores="none"
            )
        return Sublayer(node, kind, block_input, value, behind.norm, dims.token_dim, dims.batch_dim, path)
    for dims in TOKEN_DIMS:
        scores = scores_on_grid(span, dims)
        if scores is not None:
            return Sublayer(
                node, "self", block_input, value, behind.norm, dims.token_dim, dims.batch_dim, path, scores=scores
            )
    # The layout that the model has is blocked at fewer places than the others.
    reasons = min(
        filter(None, blocked), key=len, default=["its queries do not run along the tokens of a residual stream"]
    )
    raise AxisError(reasons[0])


def _has_learned_keys(query: Dim, key: Dim) -> bool:
    """Whether the keys are the tokens that ask, and learned ones concatenated with them (key biases, memory tokens)."""
    axis, own = token_axis(key), token_axis(query)
    if axis is None or own is None or not isinstance(axis.source, Concatenation):
        return False
    parts = [n for n in operand_list(axis.source.node, 0) if example_shape(n) != (0,)]
    others = [n for n, parent in zip(parts, axis.source.parents, strict=True) if parent is None]
    return set(axis.source.parents) == {own.source, None} and all(op_name(n) in MAKERS or is_learned(n) for n in others)


@dataclass(frozen=True)
class _ValueBehind:
    """The residual value behind a sublayer, and whether the block is pre-norm or post-norm."""

    value: fx.Node
    norm: Literal["pre", "post"]


def _value_behind(added: fx.Node, attention: fx.Node, block_input: fx.Node) -> _ValueBehind:
    """The residual value behind an attention sublayer: past a parallel feed-forward, past the norm of a post-norm block."""
    value = added
    while len(value.users) == 1:
        user = next(iter(value.users))
        if op_name(user) in ADDS and is_tensor(user) and example_shape(user) == example_shape(value):
            value = user
            continue
        if op_name(user) in NORMS and user.args[0] is value:
            is_final = _is_normed_before(attention, block_input) and not _is_stream(user)
            return _ValueBehind(value, "pre") if is_final else _ValueBehind(user, "post")
        break
    return _ValueBehind(value, "pre")


def _is_normed_before(attention: fx.Node, block_input: fx.Node) -> bool:
    """Whether the queries come from a norm of the block's input."""
    query = operand(attention)
    return any(op_name(user) in NORMS and gets_values_from(query, user) for user in block_input.users)


def _is_stream(norm: fx.Node) -> bool:
    """Whether a norm's output goes on as the residual stream: something computed from it is added to it."""
    for user in norm.users:
        if op_name(user) in ADDS:
            others = [n for n in tensor_operands(user) if n is not norm]
            if any(gets_values_from(other, norm) for other in others):
                return True
    return False


def _path(attention: fx.Node, added: fx.Node) -> str:
    """Path of the block: what the paths of an attention and of its residual add begin with."""
    inner, outer = module_path(attention).split("."), module_path(added).split(".")
    common = [a for a, b in zip(inner, outer, strict=False) if a == b]
    shared = common[: next((i for i, (a, b) in enumerate(zip(inner, outer, strict=False)) if a != b), len(common))]
    return ".".join(shared) or ".".join(inner) or attention.name


def _stream_of(sublayer: Sublayer, streams: list[Stream]) -> Stream | None:
    """The stream whose tokens ``sublayer`` reads its queries from."""
    for stream in reversed(streams):
        axis = token_axis(stream.flow.labels.of(sublayer.block_input)[sublayer.token_dim])
        if axis is not None and _continues(sublayer, stream):
            return stream
    return None


def _continues(sublayer: Sublayer, stream: Stream) -> bool:
    """Whether ``sublayer`` belongs to the residual chain of ``stream``: no projection, no concatenation in between."""
    value = sublayer.block_input
    if sublayer.width(value) != stream.width:
        return False
    earlier = {sublayer.value for sublayer in stream.sublayers}
    chain = ancestors(
        value,
        through=lambda node: node.op == "call_function" and op_name(node) in CHAIN,
        among=lambda node: node in stream.flow.labels,
    )
    return any(node in earlier for node in chain)


def _source_of(attention: fx.Node, streams: list[Stream]) -> int | None:
    """The stream that the keys of an attention come from."""
    key = operand(attention, 1)
    for stream in reversed(streams):
        if token_axis(stream.flow.labels.of(key)[2]) is not None:
            return stream.index
    return None


def _open_stream(sublayer: Sublayer, index: int, nodes: list[fx.Node], order: dict[fx.Node, int]) -> Stream:
    shape = example_shape(sublayer.value)
    labels = seed(shape, sublayer.batch_dim, sublayer.token_dim, index)
    flow = propagate(nodes[order[sublayer.value] + 1 :], {sublayer.value: labels}, beyond_joins=False)
    parts = max([len(r.sizes) for r in flow.readouts.values() if isinstance(r, BatchReadout)], default=1)
    return Stream(
        index,
        stream_modality(sublayer.block_input),
        sublayer.width(sublayer.value),
        special_positions(sublayer.block_input, sublayer.token_dim),
        flow=flow,
        parts=max(1, parts),
        layout=find_layout(sublayer.block_input, sublayer.token_dim),
    )
