"""Decide what the two pictures of a pair contain: :func:`draw_pair`.

A pair draws its objects from a small palette of colours and shapes, so that near misses (the right colour on the wrong
shape) are the rule. Colours are exchangeable, and so are shapes: no colour or shape is likelier than another, which is
what makes the balance argument of :mod:`zoo.scenes.statements` exact.
"""

from __future__ import annotations

from zoo.scenes.objects import ANGLES, CANVAS, COLOURS, RADII, SHAPES, Draws, Pair, Thing

MOST_THINGS = 5

_Kind = tuple[int, int, int]
"""Colour, shape, size."""


def draw_pair(draws: Draws) -> Pair:
    """Draw the contents of both pictures: 2 to 5 objects each, not overlapping."""
    colours = draws.some(len(COLOURS), 2 + draws.below(2) + (draws.uniform() < 0.2))
    shapes = draws.some(len(SHAPES), 2 + draws.below(2))
    left = _kinds(draws, colours, shapes)
    # A second picture that is a variation of the first makes comparisons of the two a matter of one object.
    right = _vary(draws, left, colours, shapes) if draws.flip() else _kinds(draws, colours, shapes)
    if draws.flip():
        left, right = right, left
    return Pair(_place(draws, left), _place(draws, right))


def _kind(draws: Draws, colours: list[int], shapes: list[int]) -> _Kind:
    return draws.choice(colours), draws.choice(shapes), draws.below(2)


def _kinds(draws: Draws, colours: list[int], shapes: list[int]) -> list[_Kind]:
    return [_kind(draws, colours, shapes) for _ in range(2 + draws.below(MOST_THINGS - 1))]


def _vary(draws: Draws, kinds: list[_Kind], colours: list[int], shapes: list[int]) -> list[_Kind]:
    varied = list(kinds)
    for _ in range(1 + draws.below(2)):
        change = draws.below(3)
        if change == 0 and len(varied) > 2:
            varied.pop(draws.below(len(varied)))
        elif change == 1 and len(varied) < MOST_THINGS:
            varied.append(_kind(draws, colours, shapes))
        else:
            varied[draws.below(len(varied))] = _kind(draws, colours, shapes)
    return varied


def _place(draws: Draws, kinds: list[_Kind]) -> tuple[Thing, ...]:
    radii = [draws.choice(RADII[size]) for _, _, size in kinds]
    spots = _scatter(draws, radii) or _on_grid(draws, radii)
    return tuple(
        Thing(colour, shape, size, x, y, radius, draws.below(ANGLES))
        for (colour, shape, size), radius, (x, y) in zip(kinds, radii, spots, strict=True)
    )


def _scatter(draws: Draws, radii: list[int]) -> list[tuple[int, int]] | None:
    """Return free places by trial, or None where the picture got too full."""
    spots: list[tuple[int, int]] = []
    for radius in radii:
        low, span = radius + 1, CANVAS - 2 * radius - 2
        for _ in range(30):
            x, y = low + draws.below(span), low + draws.below(span)
            if all(
                (x - u) ** 2 + (y - v) ** 2 >= (1.1 * (radius + r) + 1) ** 2
                for (u, v), r in zip(spots, radii, strict=False)
            ):
                spots.append((x, y))
                break
        else:
            return None
    return spots


def _on_grid(draws: Draws, radii: list[int]) -> list[tuple[int, int]]:
    """Return places in different cells of a 3 by 3 grid; any five objects fit."""
    cell = CANVAS // 3
    spots = []
    for slot, radius in zip(draws.some(9, len(radii)), radii, strict=True):
        span = cell - 2 * radius
        x = (slot % 3) * cell + radius + draws.below(span)
        y = (slot // 3) * cell + radius + draws.below(span)
        spots.append((x, y))
    return spots
