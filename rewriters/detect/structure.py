"""What is found in a graph: attention sublayers, the residual streams they belong to, and attention that fits nowhere.

Start at :class:`Structure`; :func:`rewriters.detect.streams.detect` makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import networkx as nx
from torch import fx

from madtp.sites.scoring import Scores
from rewriters.axes.propagate import Flow
from rewriters.detect.layout import Layout
from rewriters.graph.nodes import example_shape


class TokenDims(NamedTuple):
    """Which dimensions of a residual value hold the batch and the tokens."""

    batch_dim: int
    token_dim: int


# Of residual values [B, N, C], [N, B, C] and [B, C, N].
TOKEN_DIMS = (TokenDims(0, 1), TokenDims(1, 0), TokenDims(0, 2))


@dataclass
class Sublayer:
    """One attention sublayer on a residual stream.

    Attributes:
        attention: its node.
        kind: "self" if queries and keys come from the same tokens, else "cross".
        block_input: the residual value that the queries come from.
        value: the residual value after the sublayer (after its norm where ``norm`` is "post").
        norm: "pre" or "post".
        token_dim: the dimension of tokens in ``value``.
        batch_dim: the dimension of the batch in ``value``.
        path: module path.
        stream: index of its stream.
        source: index of the stream that the keys of cross-attention come from; None if they come from none.
        scores: what the attention shows of the tokens (see :class:`~rewriters.plan.plan.SitePlan`).
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

    Attributes:
        index: its number, in the order of the graph.
        modality: "text", "image", "joint" or "query".
        width: C.
        special: positions of learned tokens (class token, registers).
        sublayers: its attention sublayers, in order.
        flow: the path of its tokens from the first site on.
        parts: number of images of one sample that are stacked in the batch; 1 for one.
        layout: how tokens of several modalities are arranged; None if there is one modality.
    """

    index: int
    modality: str
    width: int
    special: tuple[int, ...]
    sublayers: list[Sublayer] = field(default_factory=list)
    flow: Flow = field(default_factory=Flow)
    parts: int = 1
    layout: Layout | None = None


@dataclass(frozen=True)
class Unplaced:
    """Attention in an unknown structure, or in an unknown spelling.

    Attributes:
        attention: the attention, or the softmax that is taken to be one.
        node: the node at which the search ended.
        reason: what was found there.
        help: what would help.
    """

    attention: fx.Node
    node: fx.Node
    reason: str
    help: str


@dataclass
class Structure:
    """What was found in a graph.

    Attributes:
        graph: the canonical graph.
        streams: residual streams, in the order of the graph.
        sublayers: attention sublayers of all streams, in the order of the graph.
        pooling: attention that condenses tokens and has none of its own to prune.
        unplaced: attention that fits nowhere, and why.
    """

    graph: fx.Graph
    streams: list[Stream]
    sublayers: list[Sublayer]
    pooling: list[fx.Node]
    unplaced: list[Unplaced]

    def network(self, place: Callable[[str], str] = str, first: int = 0) -> nx.DiGraph:
        """Streams and attention sublayers as a directed graph: which stream feeds which sublayer, which sublayer which stream.

        Args:
            place: moves module paths.
            first: number of the first stream.
        """
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
