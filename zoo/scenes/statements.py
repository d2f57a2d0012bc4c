"""Statements about a pair of pictures: :func:`draw_statement`.

Balance is exact by construction. A statement is drawn in three steps. First its *frame*: the kind, the template and
everything about it that is not exchangeable (side, number, relation, size word); a frame is taken only if the pair
allows both a true and a false *filling* of it (the colours and shapes that it names). Then a fair coin decides the
label, so that the pictures alone say nothing about it. Then a filling of that label is drawn. Colours are exchangeable
in the pictures, as shapes are, hence all fillings of a frame are equally likely under either label, so that the
words alone say nothing about it either.

Each template is a function from a census of the pair to its candidate fillings; :data:`KINDS` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zoo.scenes.objects import Draws
from zoo.scenes.phrases import COLOUR, COLOUR_SHAPE, SHAPE, SIZED, Census, Form, Phrase, phrases_of
from zoo.scenes.spatial import RELATIONS, Places, relations

SIDES = ("left", "right")
NUMBERS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True, slots=True)
class Statement:
    """An English statement with what is known about it.

    Attributes:
        text: The statement.
        label: Whether it is true.
        kind: One of :data:`KINDS`.
        counts: How many things of the left and of the right picture its first noun phrase names.
        places: For a spatial relation, where the two things are that decide it; see :mod:`zoo.scenes.spatial`.
    """

    text: str
    label: bool
    kind: str
    counts: tuple[int, int]
    places: Places | None = None


@dataclass(frozen=True, slots=True)
class Filling:
    """A way to fill a frame.

    Attributes:
        text: The statement.
        phrase: The phrase that was put in, the first of two.
        weight: How much the filling is preferred.
        places: For a spatial relation, where the two things are that decide it.
    """

    text: str
    phrase: Phrase
    weight: float
    places: Places | None = None


@dataclass(slots=True)
class Fillings:
    """The fillings of one frame, those that make it true and those that make it false."""

    true: list[Filling]
    false: list[Filling]


Template = Callable[[Census, Draws], Fillings]


def _form(draws: Draws) -> Form:
    return draws.weighted((COLOUR_SHAPE, COLOUR, SHAPE, draws.choice(SIZED)), (5, 1, 1, 3))


def _countable(draws: Draws) -> Form:
    return draws.weighted((COLOUR, SHAPE, COLOUR_SHAPE, draws.choice(SIZED)), (4, 4, 2, 2))


def _sort(
    phrases: Sequence[Phrase], say: Callable[[Phrase], str], holds: Callable[[Phrase], tuple[bool, float]]
) -> Fillings:
    """Sort phrases by truth; ``holds`` returns truth and weight, and weight 0 leaves a phrase out."""
    fillings = Fillings([], [])
    for phrase in phrases:
        truth, weight = holds(phrase)
        if weight:
            (fillings.true if truth else fillings.false).append(Filling(say(phrase), phrase, weight))
    return fillings


def _exists(census: Census, draws: Draws) -> Fillings:
    side = draws.below(2)

    def holds(phrase: Phrase) -> tuple[bool, float]:
        return census.count(side, phrase) > 0, _weigh(census, side, phrase)

    pattern = draws.choice(("there is a {} in the {} image", "the {1} image contains a {0}"))
    return _sort(phrases_of(_form(draws)), lambda phrase: pattern.format(phrase.words(), SIDES[side]), holds)


def _exists_in_some(census: Census, draws: Draws) -> Fillings:
    pattern, truth_of = draws.choice(
        (
            ("both images contain a {}", (False, False, True)),
            ("exactly one image contains a {}", (False, True, False)),
            ("at least one image contains a {}", (False, True, True)),
        )
    )
    return _by_images(census, draws, pattern, truth_of)


def _by_images(census: Census, draws: Draws, pattern: str, truth_of: tuple[bool, bool, bool]) -> Fillings:
    """Fill a statement whose truth depends on the number of images that show the phrase."""

    def holds(phrase: Phrase) -> tuple[bool, float]:
        shown = sum(count > 0 for count in census.both(phrase))
        weight = max(_weigh(census, 0, phrase), _weigh(census, 1, phrase)) if shown == 0 else 3.0
        return truth_of[shown], weight

    return _sort(phrases_of(_form(draws)), lambda phrase: pattern.format(phrase.words()), holds)


def _weigh(census: Census, side: int, phrase: Phrase) -> float:
    """Prefer what is nearly there, or is there in the other picture."""
    other = 3.0 if census.count(1 - side, phrase) else 0.0
    if census.count(side, phrase):
        return 3.0
    return other + census.nearness(side, phrase)


def _number(census: Census, draws: Draws) -> Fillings:
    side, number = draws.below(2), 1 + draws.weighted((0, 1, 2, 3), (3, 4, 3, 1))
    relation = draws.weighted(("exactly", "at least", "at most"), (3, 1, 1))

    def holds(phrase: Phrase) -> tuple[bool, float]:
        count = census.count(side, phrase)
        truth = (
            count == number if relation == "exactly" else count >= number if relation == "at least" else count <= number
        )
        return truth, (0.5 if count == 0 else 4.0 if abs(count - number) <= 1 else 1.0)

    def say(phrase: Phrase) -> str:
        verb = "is" if number == 1 else "are"
        return f"there {verb} {relation} {NUMBERS[number]} {phrase.words(plural=number > 1)} in the {SIDES[side]} image"

    return _sort(phrases_of(_countable(draws)), say, holds)


def _compare(census: Census, draws: Draws) -> Fillings:
    side = draws.below(2)
    relation = draws.choice(("more", "fewer"))

    def holds(phrase: Phrase) -> tuple[bool, float]:
        own, other = census.count(side, phrase), census.count(1 - side, phrase)
        truth = own > other if relation == "more" else own < other
        return truth, (0.5 if own + other == 0 else 4.0 if abs(own - other) <= 1 else 2.0)

    def say(phrase: Phrase) -> str:
        return f"the {SIDES[side]} image has {relation} {phrase.words(plural=True)} than the {SIDES[1 - side]} image"

    return _sort(phrases_of(_countable(draws)), say, holds)


def _same_number(census: Census, draws: Draws) -> Fillings:
    def holds(phrase: Phrase) -> tuple[bool, float]:
        left, right = census.both(phrase)
        return left == right, (0.0 if left + right == 0 else 4.0 if abs(left - right) <= 1 else 2.0)

    def say(phrase: Phrase) -> str:
        return f"the two images have the same number of {phrase.words(plural=True)}"

    return _sort(phrases_of(_countable(draws)), say, holds)


def _absent(census: Census, draws: Draws) -> Fillings:
    side = draws.below(2)

    def holds(phrase: Phrase) -> tuple[bool, float]:
        return census.count(side, phrase) == 0, _weigh(census, side, phrase)

    pattern = draws.choice(("there is no {} in the {} image", "the {1} image does not contain a {0}"))
    return _sort(phrases_of(_form(draws)), lambda phrase: pattern.format(phrase.words(), SIDES[side]), holds)


def _absent_in_both(census: Census, draws: Draws) -> Fillings:
    return _by_images(census, draws, "no image contains a {}", (True, False, False))


def _spatial(census: Census, draws: Draws) -> Fillings:
    side, number = draws.below(2), draws.below(len(RELATIONS))
    # Whether the two share colour or shape is part of the frame: it says which fillings are exchangeable.
    sharing = draws.weighted(("nothing", "colour", "shape"), (3, 1, 1))
    fillings = Fillings([], [])
    for relation in relations(census.pair.pictures[side], number, sharing):
        one, other = relation.first.words(), relation.second.words()
        text = f"a {one} is {RELATIONS[number]} a {other} in the {SIDES[side]} image"
        (fillings.true if relation.holds else fillings.false).append(
            Filling(text, relation.first, 1.0, relation.places)
        )
    return fillings


KINDS: dict[str, tuple[Template, ...]] = {
    "existence": (_exists, _exists, _exists_in_some),
    "counting": (_number,),
    "comparison": (_compare, _compare, _same_number),
    "spatial": (_spatial,),
    "negation": (_absent, _absent_in_both),
}
"""The templates of each kind; one listed twice is drawn twice as often."""

_TRIES = 12


def draw_statement(census: Census, draws: Draws, kinds: Sequence[str]) -> Statement:
    """Draw a statement about a pair that is true or false with equal probability.

    The kinds given are equally likely. A pair may allow no balanced frame of the kind drawn (two equal
    pictures cannot be compared both truly and falsely); after a few tries existence takes its place.
    """
    for name in [draws.choice(kinds)] * _TRIES + ["existence"] * 1000:
        fillings = draws.choice(KINDS[name])(census, draws)
        if fillings.true and fillings.false:
            label = draws.flip()
            options = fillings.true if label else fillings.false
            filling = draws.weighted(options, [option.weight for option in options])
            return Statement(filling.text, label, name, census.both(filling.phrase), filling.places)
    raise AssertionError("a picture with objects always allows a balanced statement of existence")
