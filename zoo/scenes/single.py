"""Captions and questions for one picture of a scene: :func:`captions`, :func:`draw_question`.

A caption names everything that is there, in one of four orders, so that it tells a picture from nearly all others. Questions
are of four kinds; the answers to those that ask for yes or no are balanced by a coin, numbers by drawing the number first, and
no colour or shape is likelier than another, as pictures favour none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zoo.scenes.objects import COLOURS, SHAPES, Draws, Pair, Thing
from zoo.scenes.phrases import COLOUR, COLOUR_SHAPE, SHAPE, SIZED, Census, Form, Phrase, phrases_of

NUMBERS = ("zero", "one", "two", "three", "four", "five")
ANSWERS = ("yes", "no", *NUMBERS, *COLOURS, *SHAPES)
"""Every answer that there is."""

_ORDERS: dict[str, Callable[[Thing], tuple[int, int]]] = {
    "from left to right": lambda thing: (thing.x, thing.y),
    "from right to left": lambda thing: (-thing.x, thing.y),
    "from top to bottom": lambda thing: (thing.y, thing.x),
    "from bottom to top": lambda thing: (-thing.y, thing.x),
}

# Forms that name a shape or a colour, of any size or of a given one.
_SHAPES = (SHAPE, *(form for form in SIZED if not form.colour))
_COLOURS = (COLOUR, *(form for form in SIZED if not form.shape))


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a picture, its answer (one of ANSWERS) and its kind (one of KINDS)."""

    question: str
    answer: str
    kind: str


def fuller_side(pair: Pair) -> int:
    """Return the side of the picture with more things in it, 0 for left or 1 for right."""
    return int(len(pair.right) > len(pair.left))


def captions(things: Sequence[Thing]) -> tuple[str, ...]:
    """Return all captions of a picture, such as "from left to right a small red circle a large blue cross"."""
    return tuple(
        " ".join([order, *(f"a {_name(thing).words()}" for thing in sorted(things, key=key))])
        for order, key in _ORDERS.items()
    )


def draw_question(census: Census, side: int, draws: Draws) -> Asked:
    """Draw a question about a picture; kinds are equally likely where the picture allows them."""
    kinds = list(KINDS)
    for kind in [kinds[place] for place in draws.some(len(kinds), len(kinds))]:
        asked = KINDS[kind](census, side, draws)
        if asked is not None:
            return Asked(*asked, kind)
    raise AssertionError("every picture has things that can be counted")


_Ask = Callable[[Census, int, Draws], "tuple[str, str] | None"]
"""Returns question and answer, or None where the picture allows no such question."""


def _colour(census: Census, side: int, draws: Draws) -> tuple[str, str] | None:
    thing = _only(census, side, draws, _SHAPES)
    return thing and (f"what colour is the {thing[0].words()}", COLOURS[thing[1].colour])


def _shape(census: Census, side: int, draws: Draws) -> tuple[str, str] | None:
    thing = _only(census, side, draws, _COLOURS)
    return thing and (f"what is the {thing[0].words()}", SHAPES[thing[1].shape])


def _only(census: Census, side: int, draws: Draws, forms: Sequence[Form]) -> tuple[Phrase, Thing] | None:
    """Return a phrase that names exactly one thing, and that thing."""
    named = [phrase for phrase in phrases_of(draws.choice(forms)) if census.count(side, phrase) == 1]
    if not named:
        return None
    phrase = draws.choice(named)
    return phrase, next(thing for thing in census.pair.pictures[side] if phrase.fits(thing))


def _number(census: Census, side: int, draws: Draws) -> tuple[str, str] | None:
    phrases = phrases_of(draws.choice(_COLOURS + _SHAPES))
    number = draws.choice(sorted({census.count(side, phrase) for phrase in phrases}))
    phrase = draws.choice([phrase for phrase in phrases if census.count(side, phrase) == number])
    return f"how many {phrase.words(plural=True)} are there", NUMBERS[number]


def _existence(census: Census, side: int, draws: Draws) -> tuple[str, str] | None:
    phrases, wanted = phrases_of(COLOUR_SHAPE), draws.flip()
    # An absent thing is more likely to be asked for the more it resembles one that is there.
    weights = [
        float(wanted) if census.count(side, phrase) else (not wanted) * census.nearness(side, phrase)
        for phrase in phrases
    ]
    return f"is there a {draws.weighted(phrases, weights).words()}", "yes" if wanted else "no"


KINDS: dict[str, _Ask] = {"colour": _colour, "shape": _shape, "number": _number, "existence": _existence}


def _name(thing: Thing) -> Phrase:
    return Phrase(thing.size, thing.colour, thing.shape)
