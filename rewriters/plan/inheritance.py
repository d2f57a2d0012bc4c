"""Inheritance: what a concatenation of streams reads at a position must survive in the stream that it comes from.

Start at :func:`inherited`; ``plan.py`` asks it. A joint stream begins with the tokens that its parts have left. A token that
one of its readouts wants is protected in the joint stream, which is too late where the part dropped it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from madtp.config import PruningConfig
from rewriters.axes.labels import Axis, token_axis
from rewriters.axes.sources import Derived, Rest, TokenRange
from rewriters.detect.layout import LayoutPart
from rewriters.detect.structure import Stream, Structure
from rewriters.graph.nodes import AxisError
from rewriters.plan.policy import original, protected_readouts

Place = tuple[fx.Node | None, int]
# So many positions are protected where it varies which of them a concatenation reads.
FEW = 16


@dataclass
class Inheritance:
    """Positions and graph values (as ``SitePlan.readouts`` has them) that a stream protects for others.

    unknown: why such a place cannot be told in the stream, which then must not be pruned.
    """

    positions: list[int] = field(default_factory=list)
    readouts: list[str] = field(default_factory=list)
    unknown: str | None = None


def inherited(structure: Structure, config: PruningConfig) -> dict[int, Inheritance]:
    """What each stream protects for the streams that begin with its tokens, by index."""
    found = {stream.index: Inheritance() for stream in structure.streams}
    by_name = {node.name: node for node in structure.graph.nodes}
    # Later streams first: what they ask of a stream is asked of the streams before that one, too.
    for stream in reversed(structure.streams):
        if stream.layout is None or not stream.layout.parts:
            continue
        try:
            positions, names = protected_readouts(stream, config)
        except AxisError:
            continue  # the stream is left alone, and reads all positions of its parts
        own = found[stream.index]
        places: list[Place] = [(None, p) for p in (*positions, *own.positions)]
        for name in (*names, *own.readouts):
            node, _, offset = name.partition("+")
            places.append((by_name[node], int(offset or 0)))
        for number, part in enumerate(stream.layout.parts):
            parent = _parent(part, structure.streams)
            if parent is not None:
                _hand_down(found[parent.index], parent, places, stream.layout.parts, number)
    return found


def _parent(part: LayoutPart, streams: Sequence[Stream]) -> Stream | None:
    """The stream whose tokens, pruned or not, a part of a concatenation holds."""
    for stream in reversed(streams):
        known = stream.flow.labels.tensor(part.node)
        if known is not None and token_axis(known[part.dim]) is not None:
            return stream
    return None


def _hand_down(
    into: Inheritance, parent: Stream, places: list[Place], parts: Sequence[LayoutPart], number: int
) -> None:
    axis = token_axis(parent.flow.labels.of(parts[number].node)[parts[number].dim])
    for place in places:
        try:
            inside = [_uncut(one, axis) for one in _within(place, parts, number)]
        except AxisError as error:
            into.unknown = str(error)
            return
        for node, offset in inside:
            if node is None:
                into.positions.append(offset)
            elif _comes_from(node, parent):
                into.unknown = (
                    f"the position {node.name} that a concatenation reads is computed from the stream's own tokens"
                )
                return
            else:
                into.readouts.append(f"{node.name}+{offset}" if offset else node.name)


def _uncut(place: Place, axis: Axis | None) -> Place:
    """A place in a part, counted in the stream that the part may have been cut from."""
    source = None if axis is None else axis.source
    while isinstance(source, (Rest, TokenRange)):
        source = source.parent
    if axis is None or isinstance(source, Derived):
        raise AxisError("a concatenation reads positions of a part that is cut from the stream")
    return original(axis.source, *place)


def _within(place: Place, parts: Sequence[LayoutPart], number: int) -> list[Place]:
    """A place of the concatenation counted in one of its parts: none if it lies in another, several where that varies."""
    node, offset = place
    before = [_size(part) for part in parts[:number]]
    static = sum(size for size in before if isinstance(size, int))
    dynamic = [size for size in before if not isinstance(size, int)]
    own = _size(parts[number])
    if node is not None and _is_size(node, own) and not before:
        return [(None, offset)] if offset < 0 else []
    if node is None and offset < 0:
        return [(None, offset)] if number == len(parts) - 1 else []
    if dynamic:
        return _behind_dynamic(node, offset, static, dynamic)
    if node is not None:
        return [(node, offset - static)]
    inside = offset - static
    return [(None, inside)] if inside >= 0 and (not isinstance(own, int) or inside < own) else []


def _behind_dynamic(node: fx.Node | None, offset: int, static: int, dynamic: list[Any]) -> list[Place]:
    """As :func:`_within`, for a part that begins where a part of varying length ends."""
    if node is None:
        # The varying parts hold a token each at least: the shorter they are, the later is the token that is read.
        last = offset - static - len(dynamic)
        if last >= FEW:
            raise AxisError("a concatenation reads a constant position behind a part of varying length")
        return [(None, position) for position in range(last + 1)]
    if len(dynamic) == 1 and _is_size(node, dynamic[0]):
        return [(None, offset - static)] if offset >= static else []
    if any(_is_size(one, size) for one in _ancestors(node) for size in dynamic):
        raise AxisError(f"the position {node.name} that a concatenation reads depends on the length of another part")
    return []


def _size(part: LayoutPart) -> Any:
    """Tokens of a part: a number, or the captured size if it varies."""
    size = part.node.meta["val"].shape[part.dim]
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return size if fixed is None else fixed


def _is_size(node: fx.Node, size: Any) -> bool:
    value = node.meta.get("val")
    return not isinstance(size, int) and hasattr(value, "node") and str(value) == str(size)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    stack, seen = [node], {node}
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return seen


def _comes_from(node: fx.Node, stream: Stream) -> bool:
    return any(sublayer.attention in _ancestors(node) for sublayer in stream.sublayers)
