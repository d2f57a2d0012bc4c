"""Axes with ticks on a :class:`~svg.Drawing`, for lines and points. Start at :class:`Axes`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from svg import NOTE, Drawing

COLOURS = ("#2f7ed8", "#d9822b", "#2a9d6f", "#b05cc6", "#c94f4f", "#7a8b2a")
"""Colours of series, in mid-tones that stand out on white and on black."""


@dataclass(frozen=True)
class Axes:
    """A plot area with scales from data to pixels.

    Attributes:
        drawing: where it is drawn.
        box: left, top, width and height of the area, in pixels.
        x_range: smallest and largest x.
        y_range: smallest and largest y.
        logarithmic: whether both scales are logarithmic.
    """

    drawing: Drawing
    box: tuple[float, float, float, float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    logarithmic: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        left, top, width, height = self.box
        return left + width * self._part(x, self.x_range), top + height * (1 - self._part(y, self.y_range))

    def _part(self, value: float, scale: tuple[float, float]) -> float:
        low, high = scale
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)

    def frame(self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> None:
        """Draw the two axes, ticks with labels, and faint lines at the ticks of y."""
        left, top, width, height = self.box
        for value, label in y_ticks:
            y = self.at(self.x_range[0], value)[1]
            self.drawing.line((left, y), (left + width, y), width=0.4)
            self.drawing.text(left - 8, y + 4, label, size=12, anchor="end")
        for value, label in x_ticks:
            x = self.at(value, self.y_range[0])[0]
            self.drawing.line((x, top + height), (x, top + height + 4), width=1)
            self.drawing.text(x, top + height + 19, label, size=12)
        self.drawing.line((left, top), (left, top + height), (left + width, top + height), colour=NOTE, width=1)

    def curve(
        self, points: Sequence[tuple[float, float]], *, colour: str, dots: bool = True, dashed: bool = False
    ) -> None:
        """Draw a line through points of data."""
        pixels = [self.at(x, y) for x, y in points]
        self.drawing.line(*pixels, colour=colour, width=2, dashed=dashed)
        if dots:
            for x, y in pixels:
                self.drawing.dot(x, y, colour=colour, radius=3.5)

    def spread(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], *, colour: str) -> None:
        """Fill the area between two curves."""
        forth = [self.at(x, y) for x, y in zip(xs, high, strict=True)]
        back = [self.at(x, y) for x, y in zip(xs, low, strict=True)][::-1]
        self.drawing.band(forth + back, colour=colour)


def legend(drawing: Drawing, x: float, y: float, names: Sequence[tuple[str, str]]) -> None:
    """Write names with their colours below each other, from the upper left corner ``x``, ``y``."""
    for number, (name, colour) in enumerate(names):
        drawing.dot(x, y + 20 * number, colour=colour)
        drawing.text(x + 11, y + 20 * number + 4.5, name, size=13, anchor="start")
