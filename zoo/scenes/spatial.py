"""Statements of spatial relation: where one object of a picture stands from another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.scenes.objects import Draws, Thing
from zoo.scenes.phrases import Census, Phrase

if TYPE_CHECKING:
    from zoo.scenes.statements import Fillings

RELATIONS = ("left of", "right of", "above", "below")
CLEAR = 7
"""Pixels between centres along the axis in question from which a relation is beyond doubt."""

_SIDES = ("left", "right")


def spatial(census: Census, draws: Draws) -> Fillings:
    """Fill "a red circle is above a blue square in the left image" with two kinds of object that are both there."""
    from zoo.scenes.statements import Fillings

    side, relation = draws.below(2), draws.below(len(RELATIONS))
    # Whether the two share colour or shape is part of the frame: it says which fillings are exchangeable.
    sharing = draws.weighted(("nothing", "colour", "shape"), (3, 1, 1))
    things = census.pair.pictures[side]
    kinds = sorted({(thing.colour, thing.shape) for thing in things})
    fillings = Fillings([], [])
    for first in kinds:
        for second in kinds:
            if first == second or _shared(first, second) != sharing:
                continue
            verdict = _verdict(
                [t for t in things if (t.colour, t.shape) == first],
                [t for t in things if (t.colour, t.shape) == second],
                relation,
            )
            if verdict is not None:
                one, other = Phrase(None, *first).words(), Phrase(None, *second).words()
                text = f"a {one} is {RELATIONS[relation]} a {other} in the {_SIDES[side]} image"
                (fillings.true if verdict else fillings.false).append((text, 1.0))
    return fillings


def _shared(first: tuple[int, int], second: tuple[int, int]) -> str:
    return "colour" if first[0] == second[0] else "shape" if first[1] == second[1] else "nothing"


def _verdict(ones: list[Thing], others: list[Thing], relation: int) -> bool | None:
    """Return the truth of the relation for some one and some other, or None where no pair decides it clearly."""
    leads = [_lead(one, other, relation) for one in ones for other in others]
    best = max(leads)
    return None if abs(best) < CLEAR else best > 0


def _lead(one: Thing, other: Thing, relation: int) -> int:
    """Return by how many pixels one thing stands in the relation to another; negative for the opposite."""
    return (other.x - one.x, one.x - other.x, other.y - one.y, one.y - other.y)[relation]
