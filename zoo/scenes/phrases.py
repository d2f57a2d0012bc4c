"""Noun phrases of the statements ("large red circle", "blue shapes") and how often a picture shows what they name.

A phrase fixes some of size, colour and shape; :class:`Census` counts matches for every phrase at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product

from zoo.scenes.objects import COLOURS, SHAPES, SIZES, Pair, Thing

ANY_SHAPE = "shape"
PLURALS = {**{shape: shape + "s" for shape in SHAPES}, "cross": "crosses", ANY_SHAPE: "shapes"}


@dataclass(frozen=True, slots=True)
class Phrase:
    """What a noun phrase asks for: indices of size, colour and shape, or None where it leaves one open."""

    size: int | None
    colour: int | None
    shape: int | None

    def fits(self, thing: Thing) -> bool:
        """Return whether the phrase names a thing."""
        return (
            (self.size is None or self.size == thing.size)
            and (self.colour is None or self.colour == thing.colour)
            and (self.shape is None or self.shape == thing.shape)
        )

    def words(self, *, plural: bool = False) -> str:
        """Return the phrase in English, without article."""
        noun = ANY_SHAPE if self.shape is None else SHAPES[self.shape]
        parts = [] if self.size is None else [SIZES[self.size]]
        parts += [] if self.colour is None else [COLOURS[self.colour]]
        return " ".join([*parts, PLURALS[noun] if plural else noun])


@dataclass(frozen=True, slots=True)
class Form:
    """Which attributes a phrase names. The size word is part of the form, since sizes are not exchangeable."""

    size: int | None
    colour: bool
    shape: bool


COLOUR_SHAPE = Form(None, True, True)
COLOUR = Form(None, True, False)
SHAPE = Form(None, False, True)
SIZED = tuple(
    Form(size, colour, shape)
    for size in range(len(SIZES))
    for colour, shape in ((True, True), (True, False), (False, True))
)


@cache
def phrases_of(form: Form) -> tuple[Phrase, ...]:
    """Return every phrase of a form."""
    colours = range(len(COLOURS)) if form.colour else (None,)
    shapes = range(len(SHAPES)) if form.shape else (None,)
    return tuple(Phrase(form.size, colour, shape) for colour, shape in product(colours, shapes))


class Census:
    """Counts of matches in both pictures of a pair."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._counts: tuple[Counter[tuple[int | None, int | None, int | None]], ...] = (Counter(), Counter())
        for counts, things in zip(self._counts, pair.pictures, strict=True):
            for thing in things:
                for size in (None, thing.size):
                    for colour in (None, thing.colour):
                        counts[size, colour, thing.shape] += 1
                        counts[size, colour, None] += 1

    def count(self, side: int, phrase: Phrase) -> int:
        """Return how many things of a picture (0 left, 1 right) a phrase names."""
        return self._counts[side].get((phrase.size, phrase.colour, phrase.shape), 0)

    def both(self, phrase: Phrase) -> tuple[int, int]:
        """Return the counts in the left and in the right picture."""
        return self.count(0, phrase), self.count(1, phrase)

    def nearness(self, side: int, phrase: Phrase) -> float:
        """Weigh an absent phrase as a distractor: most where its colour and its shape are there, on other things."""
        colour = phrase.colour is not None and self.count(side, Phrase(None, phrase.colour, None)) > 0
        shape = phrase.shape is not None and self.count(side, Phrase(None, None, phrase.shape)) > 0
        return 6.0 if colour and shape else 1.5 if colour or shape else 0.5
