"""What a scene is made of: attributes, objects, pictures, and the reproducible random numbers that choose them.

Start at :class:`Pair`, the two pictures of one item before they are drawn. :func:`draws_for` turns (seed, split,
index) into the one random stream from which everything about an item follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from madtp.errors import DataError

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")

CANVAS = 96
"""Side of a drawn picture in pixels; other image sizes are resampled from it."""

RADII = ((5, 6), (8, 9))
"""Half of an object's extent in pixels, by size index; the sprite measures 2 * radius + 1 pixels."""

ANGLES = 5
"""Number of slight rotations that a sprite comes in."""

SPLITS = {"train": 0, "val": 1, "test": 2}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape.

    Attributes:
        colour: Index into :data:`COLOURS`.
        shape: Index into :data:`SHAPES`.
        size: Index into :data:`SIZES`.
        x: Column of the centre, in pixels.
        y: Row of the centre, in pixels.
        radius: Half of its extent in pixels.
        angle: Which of the :data:`ANGLES` rotations its sprite has.
    """

    colour: int
    shape: int
    size: int
    x: int
    y: int
    radius: int
    angle: int


@dataclass(frozen=True, slots=True)
class Pair:
    """The contents of the left and the right picture."""

    left: tuple[Thing, ...]
    right: tuple[Thing, ...]

    @property
    def pictures(self) -> tuple[tuple[Thing, ...], tuple[Thing, ...]]:
        return self.left, self.right


class Draws:
    """Scalar random choices, served from blocks of a numpy generator (a scalar numpy draw costs ten times more)."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._block: list[float] = []

    def uniform(self) -> float:
        """Return a float in [0, 1)."""
        if not self._block:
            self._block = self._generator.random(256).tolist()
        return self._block.pop()

    def below(self, n: int) -> int:
        """Return an integer in [0, n)."""
        return int(self.uniform() * n)

    def between(self, low: float, high: float) -> float:
        """Return a float in [low, high)."""
        return low + (high - low) * self.uniform()

    def flip(self, probability: float = 0.5) -> bool:
        """Return True with the given probability."""
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options, all equally likely."""
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        """Return one of the options with probability proportional to its weight."""
        mark = self.uniform() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            mark -= weight
            if mark < 0:
                return option
        return options[-1]

    def some(self, n: int, k: int) -> list[int]:
        """Return k different integers below n, every subset and order equally likely."""
        pool = list(range(n))
        return [pool.pop(self.below(len(pool))) for _ in range(k)]


def draws_for(seed: int, split: str, index: int, stream: int = 0) -> Draws:
    """Return a random stream of one item: pictures and statements follow from the first. Different splits share none.

    Raises:
        DataError: The split is unknown, or seed or index is negative.
    """
    if split not in SPLITS:
        raise DataError(f"scenes have no split {split!r}; choose one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise DataError(f"seed and index of a scene must not be negative, found seed={seed}, index={index}")
    sequence = np.random.SeedSequence((seed, SPLITS[split], index, *([stream] if stream else [])))
    return Draws(np.random.Generator(np.random.Philox(sequence)))
