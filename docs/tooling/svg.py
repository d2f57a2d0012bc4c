"""Small SVG drawings for the documentation that read well on a light and on a dark page.

Start at :class:`Drawing`. The background is transparent: what lies on it (lines, notes) has a mid-tone, and boxes are filled
with a light tone under dark text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

INK = "#1f2430"  # text in boxes
NOTE = "#7f8894"  # text and lines on the page
FILLS = {
    "image": "#bcd8f6",
    "text": "#fbdcae",
    "madtp": "#c4e7c9",
    "plain": "#e3e6eb",
    "dropped": "#f4c7c3",
    "merged": "#d9c8f0",
}
"""Fills by what a box stands for: a modality, what pruning adds, anything else, tokens that are dropped or merged."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def px(value: float) -> str:
    """A number of pixels with one decimal at most, so that drawings do not differ by rounding."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass
class Drawing:
    """A drawing of a fixed size, in pixels.

    Attributes:
        width: of the drawing.
        height: of the drawing.
        title: what it shows, for readers who do not see it.
    """

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", *, fill: str = "plain", size: float = 14,
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Draw a rounded box with lines of text in its middle.

        Args:
            x: left edge.
            y: upper edge.
            width: of the box.
            height: of the box.
            text: its lines.
            fill: a key of :data:`FILLS`.
            size: of the text.
            bold: whether the first line is bold.
        """
        radius = min(6.0, height / 4)
        self.parts.append(
            f'<rect x="{px(x)}" y="{px(y)}" width="{px(width)}" height="{px(height)}" rx="{px(radius)}" fill="{FILLS[fill]}" '
            f'stroke="{NOTE}" stroke-width="0.8"/>'
        )
        lines = text.split("\n") if text else []
        for number, line in enumerate(lines):
            middle = y + height / 2 + (number - (len(lines) - 1) / 2) * size * 1.25
            self.text(x + width / 2, middle + size * 0.35, line, size=size, colour=INK, bold=bold and number == 0)

    def text(
        self, x: float, y: float, text: str, *, size: float = 13, anchor: str = "middle", colour: str = NOTE,
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Write a line of text with its base line at ``y``; ``anchor`` is "start", "middle" or "end"."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{px(x)}" y="{px(y)}" font-size="{px(size)}" text-anchor="{anchor}" fill="{colour}"{weight}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draw a line through points, with an arrowhead at its end."""
        self._line(points, ' marker-end="url(#head)"' + (' stroke-dasharray="4 3"' if dashed else ""))

    def line(self, *points: tuple[float, float], colour: str = NOTE, width: float = 1.4, dashed: bool = False) -> None:
        """Draw a line through points."""
        self._line(points, ' stroke-dasharray="4 3"' if dashed else "", colour=colour, width=width)

    def _line(
        self, points: tuple[tuple[float, float], ...], more: str, *, colour: str = NOTE, width: float = 1.4
    ) -> None:
        path = " ".join(f"{px(x)},{px(y)}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{px(width)}"{more}/>')

    def band(self, points: list[tuple[float, float]], *, colour: str) -> None:
        """Fill the area inside points with a translucent colour."""
        path = " ".join(f"{px(x)},{px(y)}" for x, y in points)
        self.parts.append(f'<polygon points="{path}" fill="{colour}" fill-opacity="0.22"/>')

    def dot(self, x: float, y: float, *, colour: str, radius: float = 4.5) -> None:
        """Draw a filled circle."""
        self.parts.append(f'<circle cx="{px(x)}" cy="{px(y)}" r="{px(radius)}" fill="{colour}"/>')

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """Draw an empty dashed frame around a group."""
        self.parts.append(
            f'<rect x="{px(x)}" y="{px(y)}" width="{px(width)}" height="{px(height)}" rx="8" fill="none" stroke="{NOTE}" '
            'stroke-width="1" stroke-dasharray="5 4"/>'
        )

    def write(self, path: Path) -> Path:
        """Write the drawing, and return the path."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{px(self.width)}" height="{px(self.height)}" '
            f'viewBox="0 0 {px(self.width)} {px(self.height)}" role="img" font-family="{FONT}">\n<title>{escape(self.title)}'
            '</title>\n<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 1 L10 5 L0 9 z" fill="{NOTE}"/></marker></defs>\n'
        )
        path.write_text(head + "\n".join(self.parts) + "\n</svg>\n", encoding="utf-8")
        return path
