"""Inheritance: what a concatenation of streams reads at a position must survive in the stream that it comes from.

Start at :func:`inherited`; ``make_plan.py`` asks it. A joint stream begins with the tokens that its parts have left. A token
that one of its readouts needs is protected in the joint stream, which is too late where a part dropped it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from madtp.config import PruningConfig
from rewriters.axes.labels import Axis, token_axis
from rewriters.axes.sources import Derived, Rest, TokenRange
from rewriters.detect.layout import LayoutPart
from rewriters.detect.structure import Stream, Structure
from rewriters.graph.nodes import AxisError
from rewriters.graph.walk import ancestors
from rewriters.plan.policy import Position, original, protected_readouts

# At most so many positions are protected where it varies which of them a concatenation reads.
MOST_CANDIDATES = 16


@dataclass
class Inheritance:
    """Positions that a stream protects for the streams that begin with its tokens.

    Attributes:
        positions: Constant ones.
        readouts: Graph values, as :attr:`SitePlan.readouts` has them.
        unknown: Why such a position cannot be told in the stream, which then must not be pruned; None if all can.
    """

    positions: list[int] = field(default_factory=list)
    readouts: list[str] = field(default_factory=list)
    unknown: str | None = None


def inherited(structure: Structure, config: PruningConfig) -> dict[int, Inheritance]:
    """What each stream protects for the streams that begin with its tokens, by index."""
    inheritances = {stream.index: Inheritance() for stream in structure.streams}
    by_name = {node.name: node for node in structure.graph.nodes}
    # Later streams first: what they ask of a stream is asked of the streams before that one, too.
    for stream in reversed(structure.streams):
        if stream.layout is None or not stream.layout.parts:
            continue
        try:
            protected = protected_readouts(stream, config)
        except AxisError:
            continue  # the stream is left alone, and reads all positions of its parts
        own = inheritances[stream.index]
        positions = [Position(None, offset) for offset in (*protected.positions, *own.positions)]
        for name in (*protected.readouts, *own.readouts):
            node, _, offset = name.partition("+")
            positions.append(Position(by_name[node], int(offset or 0)))
        for number, part in enumerate(stream.layout.parts):
            parent = _parent(part, structure.streams)
            if parent is not None:
                _hand_down(inheritances[parent.index], parent, positions, stream.layout.parts, number)
    return inheritances


def _parent(part: LayoutPart, streams: Sequence[Stream]) -> Stream | None:
    """The stream whose tokens, pruned or not, a part of a concatenation holds."""
    for stream in reversed(streams):
        known = stream.flow.labels.tensor(part.node)
        if known is not None and token_axis(known[part.dim]) is not None:
            return stream
    return None


def _hand_down(
    into: Inheritance, parent: Stream, positions: list[Position], parts: Sequence[LayoutPart], number: int
) -> None:
    axis = token_axis(parent.flow.labels.of(parts[number].node)[parts[number].dim])
    for position in positions:
        try:
            in_parent = [_uncut(one, axis) for one in _within(position, parts, number)]
        except AxisError as error:
            into.unknown = str(error)
            return
        for one in in_parent:
            if one.node is None:
                into.positions.append(one.offset)
            elif _comes_from(one.node, parent):
                into.unknown = (
                    f"the position {one.node.name} that a concatenation reads is computed from the stream's own tokens"
                )
                return
            else:
                into.readouts.append(one.readout)


def _uncut(position: Position, axis: Axis | None) -> Position:
    """A position in a part, counted in the stream that the part may have been cut from."""
    source = None if axis is None else axis.source
    while isinstance(source, (Rest, TokenRange)):
        source = source.parent
    if axis is None or isinstance(source, Derived):
        raise AxisError("a concatenation reads positions of a part that is cut from the stream")
    return original(axis.source, position.node, position.offset)


def _within(position: Position, parts: Sequence[LayoutPart], number: int) -> list[Position]:
    """A position in the concatenation, counted in one of its parts.

    There is none if it lies in another part, and there are several where that varies.
    """
    node, offset = position.node, position.offset
    before = [_size(part) for part in parts[:number]]
    static = sum(size for size in before if isinstance(size, int))
    dynamic = [size for size in before if not isinstance(size, int)]
    own = _size(parts[number])
    if node is not None and _is_size(node, own) and not before:
        return [Position(None, offset)] if offset < 0 else []
    if node is None and offset < 0:
        return [Position(None, offset)] if number == len(parts) - 1 else []
    if dynamic:
        return _behind_dynamic(node, offset, static, dynamic)
    if node is not None:
        return [Position(node, offset - static)]
    inside = offset - static
    return [Position(None, inside)] if inside >= 0 and (not isinstance(own, int) or inside < own) else []


def _behind_dynamic(
    node: fx.Node | None, offset: int, static: int, dynamic: Sequence[int | torch.SymInt]
) -> list[Position]:
    """As :func:`_within`, for a part that begins where a part of varying length ends."""
    if node is None:
        # The varying parts hold a token each at least: the shorter they are, the later is the token that is read.
        last = offset - static - len(dynamic)
        if last >= MOST_CANDIDATES:
            raise AxisError("a concatenation reads a constant position behind a part of varying length")
        return [Position(None, position) for position in range(last + 1)]
    if len(dynamic) == 1 and _is_size(node, dynamic[0]):
        return [Position(None, offset - static)] if offset >= static else []
    if any(_is_size(one, size) for one in ancestors(node) for size in dynamic):
        raise AxisError(f"the position {node.name} that a concatenation reads depends on the length of another part")
    return []


def _size(part: LayoutPart) -> int | torch.SymInt:
    """Tokens of a part: a number, or the captured size if it varies."""
    size: int | torch.SymInt = part.node.meta["val"].shape[part.dim]
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return size if fixed is None else int(fixed)


def _is_size(node: fx.Node, size: int | torch.SymInt) -> bool:
    value = node.meta.get("val")
    return not isinstance(size, int) and isinstance(value, torch.SymInt) and str(value) == str(size)


def _comes_from(node: fx.Node, stream: Stream) -> bool:
    attentions = {sublayer.attention for sublayer in stream.sublayers}
    return any(one in attentions for one in ancestors(node))
