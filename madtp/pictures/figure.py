"""The figure: a band for each example, with statement, answers, both images and the surviving patches by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madtp.errors import DataError
from madtp.pictures.examples import Example, Survival, answer_word, fade_dropped, most_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 0.92  # inches, a layer's panel
GAP = 0.30  # between the two images of a pair
LABEL = 0.17  # a line of small text under a panel
HEAD = 0.62  # statement and answers above a band
FOOT = 0.22  # space between bands
MARGIN = 0.35
TITLE = 0.85

INK, MUTED, RIGHT, WRONG, RULE = "#1d2129", "#6b7280", "#1a7f4b", "#c0362c", "#d9dce1"


class _Canvas:
    """Places things on the figure in inches from the top left corner, as a page is read."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def image(self, pixels: Any, x: float, y: float, size: float) -> None:
        box = (x / self.width, 1 - (y + size) / self.height, size / self.width, size / self.height)
        axes = self.figure.add_axes(box)
        axes.imshow(pixels, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_edgecolor(RULE)
            spine.set_linewidth(0.6)

    def text(self, words: str, x: float, y: float, size: float = 7.0, **style: Any) -> Any:
        style.setdefault("va", "top")
        return self.figure.text(x / self.width, 1 - y / self.height, words, fontsize=size, **style)

    def rule(self, y: float) -> None:
        from matplotlib.lines import Line2D

        left, right = MARGIN / self.width, 1 - MARGIN / self.width
        level = 1 - y / self.height
        self.figure.add_artist(Line2D([left, right], [level, level], color=RULE, linewidth=0.8))


def draw_figure(
    examples: Sequence[Example], path: Path, *, title: str = "What pruning keeps", layers: int = 4, dpi: int = 160
) -> Path:
    """Draw the examples to `path` (PNG, or any format that matplotlib knows by its suffix).

    Each pruned model gets a row of at most `layers` panels for each image of the sample.

    Raises:
        DataError: there is nothing to draw.
    """
    if not examples or not any(example.survivals for example in examples):
        raise DataError("no example with surviving patches to draw; pass at least one.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(len(example.survivals) for example in examples)
    images = max(len(example.images) for example in examples)
    columns = most_layers(examples, layers)
    row = PANEL + LABEL + 0.06
    whole = rows * row - LABEL - 0.06 if rows > 1 else PANEL  # an image is as tall as all rows of panels
    whole = min(whole, 2.1)
    name_width = 0.62
    block = whole + 0.08 + name_width + columns * (PANEL + 0.05)
    width = 2 * MARGIN + images * block + (images - 1) * GAP
    band = HEAD + rows * row
    height = TITLE + len(examples) * (band + FOOT) + MARGIN * 0.5

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    canvas = _Canvas(figure, width, height)
    canvas.text(title, MARGIN, 0.22, 14, color=INK, weight="bold")
    canvas.text(
        "Patches in colour survive the layer and are all that later layers compute on; faded ones were dropped.",
        MARGIN, 0.53, 8.5, color=MUTED,
    )  # fmt: skip
    top = TITLE
    for number, example in enumerate(examples, start=1):
        canvas.rule(top)
        _draw_head(canvas, number, example, top)
        for index, image in enumerate(example.images):
            left = MARGIN + index * (block + GAP)
            y = top + HEAD
            canvas.image(image.permute(1, 2, 0).numpy(), left, y, whole)
            canvas.text(f"image {index + 1}", left + whole / 2, y + whole + 0.03, color=MUTED, ha="center")
            for line, survival in enumerate(example.survivals):
                _draw_row(canvas, survival, image, index, left + whole + 0.08, y + line * row, name_width, layers)
        top += band + FOOT
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def _draw_head(canvas: _Canvas, number: int, example: Example, top: float) -> None:
    canvas.text(f"{number}.  “{example.statement}”", MARGIN, top + 0.10, 10, color=INK, weight="bold")
    x, y = MARGIN, top + 0.34
    x = _run_on(canvas, f"The statement is {answer_word(example.truth)}.", x, y, MUTED)
    for model, answer in example.answers:
        right = answer == example.truth
        x = _run_on(canvas, f"{model}:", x + 0.18, y, MUTED)
        x = _run_on(canvas, f"{answer_word(answer)} {'✓' if right else '✗'}", x + 0.05, y, RIGHT if right else WRONG)


def _run_on(canvas: _Canvas, words: str, x: float, y: float, colour: str) -> float:
    """Write words in a line and return where they end, in inches."""
    drawn = canvas.text(words, x, y, 8.5, color=colour)
    extent = drawn.get_window_extent()
    return x + extent.width / canvas.figure.dpi


def _draw_row(
    canvas: _Canvas, survival: Survival, image: Any, index: int, x: float, y: float, name_width: float, most: int
) -> None:
    words, right = survival.model.replace(" ", "\n"), x + name_width - 0.08
    canvas.text(words, right, y + PANEL / 2, 7.5, color=INK, ha="right", va="center")
    for column, site in enumerate(survival.chosen(most)):
        kept = survival.kept[site][index]
        left = x + name_width + column * (PANEL + 0.05)
        canvas.image(fade_dropped(image, kept).numpy(), left, y, PANEL)
        count = f"{survival.layers[site]}: {int(kept.sum())}/{kept.numel()}"
        canvas.text(count, left + PANEL / 2, y + PANEL + 0.03, 6.2, color=MUTED, ha="center")
