"""Policy: which tokens of a stream are never pruned, which of its segments are pruned, and which streams are left alone.

Start at :func:`segments_of`; ``plan.py`` asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from madtp.config import PruningConfig
from rewriters.axes.readouts import CONDENSED, IndexReadout, PositionReadout, PrefixReadout, RestReadout
from rewriters.axes.sources import BatchPart, Bound, Cut, Source, TokenRange
from rewriters.detect.structure import Stream
from rewriters.graph.nodes import AxisError, example_shape
from rewriters.plan.causality import hides_later_keys

# Readouts that condense a sequence; a causal stream without one is there for the sake of every position.

PREDICTED = "it is causal and every position is read (a language model): pruning its tokens would change predictions"
ASK = "towers=('text',) prunes it all the same, for scoring without training"


@dataclass(frozen=True)
class SegmentPlan:
    """A segment of a stream that several modalities share: whether it is pruned, positions in it that never are."""

    modality: str
    pruned: bool
    protected: tuple[int, ...]


def segments_of(
    stream: Stream, graph: fx.Graph, config: PruningConfig, inputs: Sequence[Any], module: torch.nn.Module
) -> tuple[SegmentPlan, ...]:
    """The segments of a stream; none where all tokens are of one modality.

    Text in which every position is predicted (causal, or with features of another modality written into it) is left alone
    unless ``config.towers`` asks for it (``madtp/api.py`` asks where the model has nothing else).
    """
    layout = stream.layout
    if layout is None:
        return ()
    found = []
    for number, modality in enumerate(layout.segments):
        pruned = config.prunes(modality)
        if pruned and modality == "text" and config.towers is None and not _is_condensed(stream):
            pruned = layout.mask is None and not _is_causal(stream, graph, inputs, module, number)
        found.append(SegmentPlan(modality, pruned, config.protected_positions(modality)))
    return tuple(found)


def left_alone(
    stream: Stream,
    segments: tuple[SegmentPlan, ...],
    graph: fx.Graph,
    config: PruningConfig,
    inputs: Sequence[Any],
    module: torch.nn.Module,
) -> tuple[str, str] | None:
    """Why a stream is not pruned, and what would change it; None if it is pruned."""
    if segments:
        if any(segment.pruned for segment in segments):
            return None
        if config.towers is None:
            return PREDICTED, ASK
        names = ", ".join(repr(m) for m in dict.fromkeys(s.modality for s in segments))
        return f"config.towers leaves out the segments of its stream ({names})", "add one of them to towers"
    if not config.prunes(stream.modality):
        return f"config.towers leaves out the modality {stream.modality!r}", "add it to towers"
    if config.towers is None and not _is_condensed(stream) and _is_causal(stream, graph, inputs, module):
        return PREDICTED, ASK
    return None


def is_predicted(
    stream: Stream,
    segments: tuple[SegmentPlan, ...],
    graph: fx.Graph,
    inputs: Sequence[Any],
    module: torch.nn.Module,
) -> bool:
    """Whether pruning takes from the text of a language model: it is causal and every position is read."""
    text = any(s.pruned and s.modality == "text" for s in segments) if segments else stream.modality == "text"
    return text and not _is_condensed(stream) and _is_causal(stream, graph, inputs, module)


def _is_condensed(stream: Stream) -> bool:
    return any(isinstance(readout, CONDENSED) for readout in stream.flow.readouts.values())


def _is_causal(
    stream: Stream, graph: fx.Graph, inputs: Sequence[Any], module: torch.nn.Module, segment: int | None = None
) -> bool:
    first = next((s for s in stream.sublayers if s.kind == "self"), None)
    if first is None:
        return False
    among = None
    if segment is not None and stream.layout is not None:
        offset, inside = 0, []
        for part in stream.layout.parts:
            length = example_shape(part.node)[part.dim]
            if part.segment == segment:
                inside += [offset, offset + length]
            offset += length
        among = (min(inside), max(inside))
    return hides_later_keys(graph, first.attention, inputs, module, among)


def protected_readouts(stream: Stream, config: PruningConfig) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions that must survive: learned tokens, constant readouts, prefixes, configured ones; and the graph values that hold
    further ones ("node+3": three tokens behind what the node says).

    Raises :class:`AxisError` for a position that no single graph value tells.
    """
    positions: list[int] = list(stream.special)
    nodes: list[str] = []

    def protect(place: tuple[fx.Node | None, int]) -> None:
        node, offset = place
        if node is None:
            positions.append(offset)
        else:
            nodes.append(f"{node.name}+{offset}" if offset else node.name)

    for readout in stream.flow.readouts.values():
        source = readout.axis.source
        if isinstance(readout, PositionReadout):
            protect(original(source, None, readout.position))
        elif isinstance(readout, (PrefixReadout, RestReadout)):
            for position in range(readout.length if isinstance(readout, PrefixReadout) else readout.start):
                protect(original(source, None, position))
        elif isinstance(readout, IndexReadout):
            protect(original(source, readout.index, 0))
    if stream.layout is None:
        positions.extend(config.protected_positions(stream.modality))
    return tuple(dict.fromkeys(positions)), tuple(dict.fromkeys(nodes))


def original(source: Source, node: fx.Node | None, offset: int) -> tuple[fx.Node | None, int]:
    """The position in the stream's own tokens of position ``node + offset`` of a derived axis."""
    while isinstance(source, Cut):
        start: Bound = 0 if isinstance(source, BatchPart) else source.start
        end = source.end if isinstance(source, TokenRange) else None
        border = start if node is not None or offset >= 0 else end
        if isinstance(border, fx.Node):
            if node is not None:
                raise AxisError(f"a position is read that depends on both {node.name} and {border.name}")
            node = border
        elif border is not None:
            if border < 0 and node is not None:
                raise AxisError(f"a position is read that depends on {node.name} and on the length")
            offset += border
        source = source.parent
    return node, offset
