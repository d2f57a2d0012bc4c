"""Policy: which tokens are never pruned, which segments of a stream are pruned, and which streams are left alone.

``make_plan.py`` asks :func:`segments_of`, then :func:`left_alone`, then :func:`protected_readouts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import fx

from madtp.config import PruningConfig
from rewriters.axes.readouts import CONDENSED, IndexReadout, PositionReadout, PrefixReadout, RestReadout
from rewriters.axes.sources import BatchPart, Bound, Cut, Source, TokenRange
from rewriters.detect.structure import Stream
from rewriters.graph.nodes import AxisError, example_shape
from rewriters.plan.causality import Example, hides_later_keys


class Policy(Enum):
    """A choice by which a stream is left alone although it could be pruned."""

    TOWERS = "towers"
    """``PruningConfig.towers`` leaves its modality out."""
    LAYERS = "layers"
    """``PruningConfig.layers`` leaves its block out."""
    LANGUAGE_MODEL = "language model"
    """It is the text of a language model, whose predictions pruning would change."""


@dataclass(frozen=True)
class LeftAlone:
    """Why a stream is left alone.

    Attributes:
        policy: The choice.
        reason: The choice in words.
        help: What would change it.
    """

    policy: Policy
    reason: str
    help: str


LANGUAGE_MODEL = LeftAlone(
    Policy.LANGUAGE_MODEL,
    reason="it is causal and every position is read (a language model): pruning its tokens would change predictions",
    help="towers=('text',) prunes it all the same, for scoring without training",
)


LAYERS = LeftAlone(
    Policy.LAYERS,
    reason="config.layers leaves it out",
    help="add its number, or a pattern that fits its path, to layers",
)


@dataclass(frozen=True)
class SegmentPlan:
    """A segment of a stream that several modalities share.

    Attributes:
        modality: Modality of its tokens.
        pruned: Whether they are pruned.
        protected: Positions in the segment that always survive.
    """

    modality: str
    pruned: bool
    protected: tuple[int, ...]


@dataclass(frozen=True)
class Position:
    """A position among the tokens of a stream: ``offset``, counted from the value of ``node`` where there is one.

    A negative offset without a node counts from the end.
    """

    node: fx.Node | None
    offset: int

    @property
    def readout(self) -> str:
        """The position as :attr:`SitePlan.readouts` has it; there has to be a node."""
        assert self.node is not None
        return f"{self.node.name}+{self.offset}" if self.offset else self.node.name


@dataclass(frozen=True)
class ProtectedPositions:
    """Positions that must survive; the fields are those of :class:`~rewriters.plan.plan.SitePlan`.

    Attributes:
        positions: Constant ones.
        readouts: Names of nodes that hold further ones.
    """

    positions: tuple[int, ...]
    readouts: tuple[str, ...]


def segments_of(stream: Stream, config: PruningConfig, example: Example) -> tuple[SegmentPlan, ...]:
    """The segments of a stream; none where all tokens are of one modality.

    Text in which every position is predicted (causal, or with features of another modality written into it) is left alone
    unless ``config.towers`` asks for it; ``madtp/api.py`` asks where the model has nothing else.
    """
    layout = stream.layout
    if layout is None:
        return ()
    segments = []
    for number, modality in enumerate(layout.segments):
        pruned = config.prunes(modality)
        if pruned and modality == "text" and config.towers is None and not _is_condensed(stream):
            pruned = layout.mask is None and not _is_causal(stream, example, number)
        segments.append(SegmentPlan(modality, pruned, config.protected_positions(modality)))
    return tuple(segments)


def left_alone(
    stream: Stream, segments: tuple[SegmentPlan, ...], config: PruningConfig, example: Example
) -> LeftAlone | None:
    """Why a stream is not pruned; None if it is."""
    if segments:
        if any(segment.pruned for segment in segments):
            return None
        if config.towers is None:
            return LANGUAGE_MODEL
        names = ", ".join(repr(m) for m in dict.fromkeys(s.modality for s in segments))
        reason = f"config.towers leaves out the segments of its stream ({names})"
        return LeftAlone(Policy.TOWERS, reason, "add one of them to towers")
    if not config.prunes(stream.modality):
        reason = f"config.towers leaves out the modality {stream.modality!r}"
        return LeftAlone(Policy.TOWERS, reason, "add it to towers")
    if config.towers is None and not _is_condensed(stream) and _is_causal(stream, example):
        return LANGUAGE_MODEL
    return None


def is_predicted(stream: Stream, segments: tuple[SegmentPlan, ...], example: Example) -> bool:
    """Whether pruning takes from the text of a language model: it is causal and every position is read."""
    text = any(s.pruned and s.modality == "text" for s in segments) if segments else stream.modality == "text"
    return text and not _is_condensed(stream) and _is_causal(stream, example)


def _is_condensed(stream: Stream) -> bool:
    """Whether a readout condenses the sequence; a causal stream without one serves for the sake of every position."""
    return any(isinstance(readout, CONDENSED) for readout in stream.flow.readouts.values())


def _is_causal(stream: Stream, example: Example, segment: int | None = None) -> bool:
    """Whether attention in the stream, or among the tokens of one of its segments, hides later tokens."""
    first = next((s for s in stream.sublayers if s.kind == "self"), None)
    if first is None:
        return False
    if segment is None or stream.layout is None:
        return hides_later_keys(example, first.attention)
    offset, borders = 0, []
    for part in stream.layout.parts:
        length = example_shape(part.node)[part.dim]
        if part.segment == segment:
            borders += [offset, offset + length]
        offset += length
    return hides_later_keys(example, first.attention, (min(borders), max(borders)))


def protected_readouts(stream: Stream, config: PruningConfig) -> ProtectedPositions:
    """Positions that must survive: learned tokens, constant readouts, prefixes and configured ones; and graph values.

    Raises:
        AxisError: No single graph value tells a position.
    """
    protected = [Position(None, position) for position in stream.special]
    for readout in stream.flow.readouts.values():
        source = readout.axis.source
        if isinstance(readout, PositionReadout):
            protected.append(original(source, None, readout.position))
        elif isinstance(readout, (PrefixReadout, RestReadout)):
            count = readout.length if isinstance(readout, PrefixReadout) else readout.start
            protected.extend(original(source, None, position) for position in range(count))
        elif isinstance(readout, IndexReadout):
            protected.append(original(source, readout.index, 0))
    if stream.layout is None:
        protected.extend(Position(None, position) for position in config.protected_positions(stream.modality))
    return ProtectedPositions(
        positions=tuple(dict.fromkeys(p.offset for p in protected if p.node is None)),
        readouts=tuple(dict.fromkeys(p.readout for p in protected if p.node is not None)),
    )


def original(source: Source, node: fx.Node | None, offset: int) -> Position:
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
    return Position(node, offset)
