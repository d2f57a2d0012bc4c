"""The figure: a band for each example, with statement, answers, images and the surviving patches by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from madtp.atomic_files import replacing_file
from madtp.errors import DataError
from madtp.pictures.examples import Example, KeptPatches, answer_word, most_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

PANEL = 0.92  # inches, a layer's panel
GAP = 0.30  # between the two images of a pair
LABEL = 0.17  # a line of small text under a panel
HEAD, HEAD_ALONE = 0.62, 0.38  # what stands above a band, with and without answers
FOOT = 0.22  # space between bands
MARGIN = 0.35
TITLE = 0.85

LEGEND = "Patches in colour survive the layer and are all that later layers compute on; faded ones were dropped."
NARROW, SHORT_LEGEND = 6.8, "In colour: patches that survive the layer. Faded: dropped."

INK, MUTED, RIGHT, WRONG, RULE = "#1d2129", "#6b7280", "#1a7f4b", "#c0362c", "#d9dce1"


class _Canvas:
    """Places elements on the figure, in inches from the top left corner."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def image(self, pixels: npt.NDArray[np.uint8], x: float, y: float, size: float) -> None:
        box = (x / self.width, 1 - (y + size) / self.height, size / self.width, size / self.height)
        axes = self.figure.add_axes(box)
        axes.imshow(pixels, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_edgecolor(RULE)
            spine.set_linewidth(0.6)

    def text(
        self,
        words: str,
        x: float,
        y: float,
        size: float = 7.0,
        *,
        color: str,
        weight: str = "normal",
        ha: str = "left",
        va: str = "top",
    ) -> Text:
        return self.figure.text(
            x / self.width, 1 - y / self.height, words, fontsize=size, color=color, weight=weight, ha=ha, va=va
        )

    def rule(self, y: float) -> None:
        from matplotlib.lines import Line2D

        left, right = MARGIN / self.width, 1 - MARGIN / self.width
        level = 1 - y / self.height
        self.figure.add_artist(Line2D([left, right], [level, level], color=RULE, linewidth=0.8))


def draw_figure(
    examples: Sequence[Example],
    path: Path,
    *,
    title: str = "What pruning keeps",
    layers: int = 4,
    panel: float = PANEL,
    dpi: int = 160,
) -> Path:
    """Draw the examples.

    Each pruned model has a row of panels for each image of the sample.

    Args:
        examples: what to draw.
        path: file to write: PNG, or any format that matplotlib knows by its suffix.
        title: heading of the figure.
        layers: number of panels in a row at most.
        panel: side of a panel in inches.
        dpi: resolution.

    Returns:
        The path.

    Raises:
        DataError: if there is nothing to draw.
    """
    if not examples or not any(example.kept_patches for example in examples):
        raise DataError("no example with surviving patches to draw; pass at least one.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(len(example.kept_patches) for example in examples)
    images = max(len(example.images) for example in examples)
    columns = most_layers(examples, layers)
    row = panel + LABEL + 0.06
    whole = rows * row - LABEL - 0.06 if rows > 1 else panel  # an image is as tall as all rows of panels
    whole = min(whole, max(2.1, panel))
    name_width = 0.62
    block = whole + 0.08 + name_width + columns * (panel + 0.05)
    width = 2 * MARGIN + images * block + (images - 1) * GAP
    head = HEAD if any(example.truth is not None for example in examples) else HEAD_ALONE
    band = head + rows * row
    height = TITLE + len(examples) * (band + FOOT) + MARGIN * 0.5

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    canvas = _Canvas(figure, width, height)
    canvas.text(title, MARGIN, 0.22, 14, color=INK, weight="bold")
    canvas.text(LEGEND if width > NARROW else SHORT_LEGEND, MARGIN, 0.53, 8.5, color=MUTED)
    top = TITLE
    for number, example in enumerate(examples, start=1):
        canvas.rule(top)
        _draw_head(canvas, number, example, top)
        for index, image in enumerate(example.images):
            left = MARGIN + index * (block + GAP)
            y = top + head
            canvas.image(image.permute(1, 2, 0).numpy(), left, y, whole)
            if len(example.images) > 1 or example.truth is not None:
                canvas.text(f"image {index + 1}", left + whole / 2, y + whole + 0.03, color=MUTED, ha="center")
            for line, patches in enumerate(example.kept_patches):
                corner = _Row(left + whole + 0.08, y + line * row, name_width, panel)
                _draw_row(canvas, corner, patches.model, _panels(patches, image, index, layers))
        top += band + FOOT
    with replacing_file(path) as draft:
        figure.savefig(draft, dpi=dpi)
    return path


def _draw_head(canvas: _Canvas, number: int, example: Example, top: float) -> None:
    statement = example.statement if example.truth is None else f"“{example.statement}”"
    canvas.text(f"{number}.  {statement}", MARGIN, top + 0.10, 10, color=INK, weight="bold")
    if example.truth is None:
        return
    x, y = MARGIN, top + 0.34
    x = _run_on(canvas, f"The statement is {answer_word(example.truth)}.", x, y, colour=MUTED)
    for model, answer in example.answers:
        right = answer == example.truth
        x = _run_on(canvas, f"{model}:", x + 0.18, y, colour=MUTED)
        x = _run_on(
            canvas, f"{answer_word(answer)} {'✓' if right else '✗'}", x + 0.05, y, colour=RIGHT if right else WRONG
        )


def _run_on(canvas: _Canvas, words: str, x: float, y: float, *, colour: str) -> float:
    """Write words in a line, and return the position of their end in inches."""
    drawn = canvas.text(words, x, y, 8.5, color=colour)
    extent = drawn.get_window_extent()
    return x + float(extent.width) / canvas.figure.dpi


@dataclass(frozen=True)
class _Row:
    """Where a row of panels stands: its left top corner, the width of the model's name, and the side of a panel, in inches."""

    x: float
    y: float
    name_width: float
    panel: float


@dataclass(frozen=True)
class _Panel:
    """One layer of a row: the image with its dropped patches faded, and a caption."""

    pixels: npt.NDArray[np.uint8]
    caption: str


def _panels(patches: KeptPatches, image: Tensor, index: int, most: int) -> list[_Panel]:
    """The panels of one image, which is number ``index`` of its sample."""
    found = []
    for site in patches.spread_layers(most):
        kept = patches.kept[site][index]
        caption = f"{patches.layers[site]}: {int(kept.sum())}/{kept.numel()}"
        found.append(_Panel(patches.faded(site, image, index).numpy(), caption))
    return found


def _draw_row(canvas: _Canvas, row: _Row, model: str, panels: Sequence[_Panel]) -> None:
    right = row.x + row.name_width - 0.08
    size = 6.2 if row.panel <= PANEL else 8.0
    canvas.text(model.replace(" ", "\n"), right, row.y + row.panel / 2, 7.5, color=INK, ha="right", va="center")
    for column, panel in enumerate(panels):
        left = row.x + row.name_width + column * (row.panel + 0.05)
        canvas.image(panel.pixels, left, row.y, row.panel)
        canvas.text(panel.caption, left + row.panel / 2, row.y + row.panel + 0.03, size, color=MUTED, ha="center")
