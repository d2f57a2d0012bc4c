"""Spatial relations between the objects of a picture: :func:`relations`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zoo.scenes.objects import CANVAS, Thing
from zoo.scenes.phrases import Phrase

RELATIONS = ("left of", "right of", "above", "below")
CLEAR = 7
"""Pixels between centres along the axis in question from which a relation is beyond doubt."""

Places = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Relation:
    """Whether some object that ``first`` names stands in the relation to some object that ``second`` names.

    Attributes:
        first: The phrase that comes first.
        second: The phrase that comes second.
        holds: Whether the relation holds.
        places: Centres x, y of the two objects that decide it, in the same order, as fractions of the picture.
    """

    first: Phrase
    second: Phrase
    holds: bool
    places: Places


def relations(things: Sequence[Thing], number: int, sharing: str) -> Iterator[Relation]:
    """Yield what RELATIONS[number] says of the kinds of object in a picture, leaving out what is not clear.

    Args:
        things: the objects of the picture.
        number: index into RELATIONS.
        sharing: what the two kinds have in common: "nothing", "colour" or "shape".
    """
    kinds = sorted({(thing.colour, thing.shape) for thing in things})
    for first in kinds:
        for second in kinds:
            if first == second or _shared(first, second) != sharing:
                continue
            lead, one, other = max(
                (
                    (_lead(one, other, number), one, other)
                    for one in things
                    for other in things
                    if (one.colour, one.shape) == first and (other.colour, other.shape) == second
                ),
                key=lambda entry: entry[0],
            )
            if abs(lead) >= CLEAR:
                places = (one.x / CANVAS, one.y / CANVAS, other.x / CANVAS, other.y / CANVAS)
                yield Relation(Phrase(None, *first), Phrase(None, *second), lead > 0, places)


def _shared(first: tuple[int, int], second: tuple[int, int]) -> str:
    return "colour" if first[0] == second[0] else "shape" if first[1] == second[1] else "nothing"


def _lead(one: Thing, other: Thing, number: int) -> int:
    """Return by how many pixels one thing stands in the relation to another; negative for the opposite."""
    return (other.x - one.x, one.x - other.x, other.y - one.y, one.y - other.y)[number]
