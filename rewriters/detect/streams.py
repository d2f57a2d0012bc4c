"""Detect: residual streams, attention sublayers, modalities and readouts of a canonical graph.

Start at :func:`detect`. From each attention node the walk goes back to the residual value that its queries come from
and forward to the residual add. What the sublayers of one chain share is a *stream*. Nothing here knows any
architecture: the evidence is where axis labels go (``axes/propagate.py``) and which inputs a stream descends from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx
from torch import fx

from madtp.sites.scoring import Scores
from rewriters.axes.labels import seed, token_axis
from rewriters.axes.outcome import query_and_key
from rewriters.axes.propagate import Flow, propagate
from rewriters.axes.readouts import BatchReadout
from rewriters.canonicalise.attention import looks_like_attention
from rewriters.detect.layout import Layout, find_layout
from rewriters.detect.modality import pools, special_positions, stream_modality, weighs_by_layer
from rewriters.detect.windows import condenses_own, scores_on_grid
from rewriters.graph.nodes import AxisError, example_shape, is_attention, is_tensor, module_path, op_name
from rewriters.graph.op_sets import ADDS, NORMS, RESIDUAL_STEPS
from rewriters.graph.residual import gets_values_from, residual_of
from rewriters.graph.walk import ancestors, positions

# Operations that a residual value may pass between blocks of one stream.
CHAIN = ADDS | NORMS | RESIDUAL_STEPS | {"slice"}
# Batch and token dimension of residual values [B, N, C], [N, B, C] and [B, C, N].
LAYOUTS = ((0, 1), (1, 0), (0, 2))


@dataclass
class Sublayer:
    """One attention sublayer on a residual stream.

    Attributes:
        attention: its node. kind: "self" or "cross". block_input: residual value that the queries come from.
        value: residual value after the sublayer (after its norm where ``norm`` is "post").
        token_dim, batch_dim: of ``value``. path: module path. stream, source: indices of streams (source: of the keys).
        scores: what the attention tells of the tokens (see :class:`~rewriters.plan.plan.SitePlan`).
    """

    attention: fx.Node
    kind: Literal["self", "cross"]
    block_input: fx.Node
    value: fx.Node
    norm: Literal["pre", "post"]
    token_dim: int
    batch_dim: int
    path: str
    stream: int = -1
    source: int | None = None
    scores: Scores = "attention"

    def width(self, value: fx.Node) -> int:
        """C of a residual value."""
        return example_shape(value)[3 - self.batch_dim - self.token_dim]


@dataclass
class Stream:
    """A chain of residual states of one token sequence.

    special: positions of learned tokens (class token, registers). flow: where its tokens go from the first site on.
    layout: of a stream that several modalities share.
    """

    index: int
    modality: str
    width: int
    special: tuple[int, ...]
    sublayers: list[Sublayer] = field(default_factory=list)
    flow: Flow = field(default_factory=Flow)
    parts: int = 1
    layout: Layout | None = None


@dataclass
class Structure:
    """What was found in a graph. pooling: attention that condenses tokens and has none of its own to prune. unplaced: what is
    attention, but of no known structure, and why."""

    graph: fx.Graph
    streams: list[Stream]
    sublayers: list[Sublayer]
    pooling: list[fx.Node]
    unplaced: list[tuple[fx.Node, str]]

    def network(self, place: Callable[[str], str] = str, first: int = 0) -> nx.DiGraph:
        """Streams and attention sublayers as a directed graph: which stream feeds which sublayer, which sublayer
        which stream. Module paths are moved by ``place``, numbers of streams by ``first``."""
        network = nx.DiGraph()
        for stream in self.streams:
            network.add_node(
                f"stream {first + stream.index}", kind="stream", modality=stream.modality, width=stream.width
            )
        chains: dict[int, list[str]] = {stream.index: [] for stream in self.streams}
        for sublayer in self.sublayers:
            name = place(sublayer.path)
            while name in network:
                name += "'"
            network.add_node(name, kind=sublayer.kind, stream=first + sublayer.stream, norm=sublayer.norm)
            chains[sublayer.stream].append(name)
            network.add_edge(f"stream {first + sublayer.stream}", name, role="queries")
            if sublayer.source is not None:
                network.add_edge(f"stream {first + sublayer.source}", name, role="keys")
        for chain in chains.values():
            nx.add_path(network, chain, role="residual")
        return network


def detect(graph: fx.Graph) -> Structure:
    """Find sublayers, streams and readouts; what could not be placed is listed with the reason."""
    nodes = list(graph.nodes)
    order = positions(graph)
    streams: list[Stream] = []
    sublayers: list[Sublayer] = []
    pooling: list[fx.Node] = []
    unplaced: list[tuple[fx.Node, str]] = []
    for node in nodes:
        if looks_like_attention(node) and weighs_by_layer(node):
            pooling.append(node)
        elif looks_like_attention(node):
            unplaced.append((node, "attention in a spelling that the rewriter does not know"))
        if not is_attention(node):
            continue
        try:
            sublayer = _sublayer(node, nodes, order)
            stream = _stream_of(sublayer, streams)
            if stream is None and sublayer.kind == "self":
                stream = _open_stream(sublayer, len(streams), nodes, order)
                streams.append(stream)
            if stream is None:
                raise AxisError("cross-attention whose queries come from no stream with self-attention")
            sublayer.stream = stream.index
            sublayer.source = _source_of(node, streams) if sublayer.kind == "cross" else None
        except AxisError as error:
            by_layer = op_name(node) == "weigh" and weighs_by_layer(node.args[0])
            if by_layer or pools(node):
                pooling.append(node)
            else:
                unplaced.append((node, str(error)))
            continue
        stream.sublayers.append(sublayer)
        sublayers.append(sublayer)
    return Structure(graph, streams, sublayers, pooling, unplaced)


def _sublayer(node: fx.Node, nodes: list[fx.Node], order: dict[fx.Node, int]) -> Sublayer:
    residual = residual_of(node)
    block_input, added = residual.before, residual.after
    shape = example_shape(block_input)
    if len(shape) != 3:
        raise AxisError(f"its residual stream has {len(shape)} dimensions; [B, N, C], [N, B, C] or [B, C, N] is needed")
    between = nodes[order[block_input] + 1 : order[node]]
    value, norm = _after(added, node, block_input)
    if example_shape(value) != shape:
        raise AxisError("the residual stream changes its shape")
    path = _path(node, added)
    blocked: list[list[str]] = []
    for batch_dim, token_dim in LAYOUTS:
        flow = propagate(between, {block_input: seed(shape, batch_dim, token_dim, "probe")})
        blocked.append(list(flow.blocked.values()))
        query, key = query_and_key(node, flow.labels)
        try:
            if token_axis(query) is None:
                continue
            kind: Literal["self", "cross"] = "self" if token_axis(query) == token_axis(key) else "cross"
        except AxisError:
            continue
        if kind == "cross" and condenses_own(node, block_input, nodes, batch_dim, token_dim):
            return Sublayer(node, "self", block_input, value, norm, token_dim, batch_dim, path, scores="none")
        return Sublayer(node, kind, block_input, value, norm, token_dim, batch_dim, path)
    for batch_dim, token_dim in LAYOUTS:
        scores = scores_on_grid(node, block_input, value, nodes, batch_dim, token_dim)
        if scores is not None:
            return Sublayer(node, "self", block_input, value, norm, token_dim, batch_dim, path, scores=scores)
    # The layout that the model has is blocked at fewer places than the other one.
    reasons = min(
        filter(None, blocked), key=len, default=["its queries do not run along the tokens of a residual stream"]
    )
    raise AxisError(reasons[0])


def _after(added: fx.Node, attention: fx.Node, block_input: fx.Node) -> tuple[fx.Node, Literal["pre", "post"]]:
    """The residual value behind an attention sublayer: past a parallel feed-forward, past the norm of a post-norm block."""
    value = added
    while len(value.users) == 1:
        user = next(iter(value.users))
        if op_name(user) in ADDS and is_tensor(user) and example_shape(user) == example_shape(value):
            value = user
            continue
        if op_name(user) in NORMS and user.args[0] is value:
            final = _normed_before(attention, block_input) and not _is_stream(user)
            return (value, "pre") if final else (user, "post")
        break
    return value, "pre"


def _normed_before(attention: fx.Node, block_input: fx.Node) -> bool:
    """Whether the queries come from a norm of the block's input."""
    query: Any = attention.args[0]
    return any(op_name(user) in NORMS and gets_values_from(query, user) for user in block_input.users)


def _is_stream(norm: fx.Node) -> bool:
    """Whether a norm's output goes on as the residual stream: something computed from it is added to it."""
    for user in norm.users:
        if op_name(user) in ADDS:
            others = [a for a in user.args[:2] if isinstance(a, fx.Node) and a is not norm]
            if any(gets_values_from(other, norm) for other in others):
                return True
    return False


def _path(attention: fx.Node, added: fx.Node) -> str:
    inner, outer = module_path(attention).split("."), module_path(added).split(".")
    common = [a for a, b in zip(inner, outer, strict=False) if a == b]
    shared = common[: next((i for i, (a, b) in enumerate(zip(inner, outer, strict=False)) if a != b), len(common))]
    return ".".join(shared) or ".".join(inner) or attention.name


def _stream_of(sublayer: Sublayer, streams: list[Stream]) -> Stream | None:
    """The stream whose tokens ``sublayer`` reads its queries from."""
    for stream in reversed(streams):
        known = stream.flow.labels.tensor(sublayer.block_input)
        if known is None:
            continue
        axis = token_axis(known[sublayer.token_dim])
        if axis is not None and _continues(sublayer, stream):
            return stream
    return None


def _continues(sublayer: Sublayer, stream: Stream) -> bool:
    """Whether ``sublayer`` stands on the residual chain of ``stream``: no projection, no concatenation in between."""
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
    key = attention.args[1]
    for stream in reversed(streams):
        known = stream.flow.labels.tensor(key)
        if known is not None and token_axis(known[2]) is not None:
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
