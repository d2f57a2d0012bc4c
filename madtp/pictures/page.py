"""The page: measurements and examples in one self-contained HTML file, without scripts or network access."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from torch import Tensor

from madtp.atomic_files import write_text
from madtp.errors import DataError
from madtp.pictures.examples import Example, KeptPatches, answer_word


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
        model: name of the model.
        accuracy: fraction of correct answers.
        macs: multiply-accumulates per sample.
        reduction: fraction of the dense MACs that is saved.
        image_tokens: mean number of image tokens after each layer.
        text_tokens: mean number of text tokens after each layer.
        milliseconds: time per sample.
    """

    model: str
    accuracy: float
    macs: float
    reduction: float
    image_tokens: tuple[float, ...]
    text_tokens: tuple[float, ...]
    milliseconds: float


def write_page(
    examples: Sequence[Example], measurements: Sequence[Measurement], path: Path, *, title: str, note: str
) -> Path:
    """Write the page.

    Args:
        examples: samples to show.
        measurements: rows of the table.
        path: file to write.
        title: heading of the page.
        note: how the measurements were made.

    Returns:
        The path.

    Raises:
        DataError: if there is nothing to show.
    """
    if not examples or not measurements:
        raise DataError("the page needs at least one example and one measurement.")
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    body = template.substitute(
        title=html.escape(title),
        note=html.escape(note),
        rows="\n".join(_table_row(m) for m in measurements),
        examples="\n".join(_card(number, example) for number, example in enumerate(examples, start=1)),
    )
    write_text(path, body)
    return path


def format_macs(macs: float) -> str:
    """Format MACs with a unit: "212.3 M", "132.54 G"."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"


def format_tokens(counts: Sequence[float]) -> str:
    """Format mean counts by layer, "64 48 30"; a constant count is printed once."""
    rounded = [f"{count:.0f}" for count in counts]
    if len(set(rounded)) == 1:
        return f"{rounded[0]} in each layer"
    return " ".join(rounded)


def format_reduction(reduction: float) -> str:
    """Format how far MACs fall, "−80.0%"; the row of the dense model has a dash."""
    return f"−{100 * reduction:.1f}%" if reduction else "–"


def measurement_cells(m: Measurement) -> tuple[str, ...]:
    """Format the numbers of a measurement, from the accuracy to the time."""
    return (
        f"{100 * m.accuracy:.1f}%",
        format_macs(m.macs),
        format_reduction(m.reduction),
        format_tokens(m.image_tokens),
        format_tokens(m.text_tokens),
        f"{m.milliseconds:.2f}",
    )


def _table_row(m: Measurement) -> str:
    cells = measurement_cells(m)
    return f"<tr><th scope='row'>{html.escape(m.model)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _card(number: int, example: Example) -> str:
    answers = ""
    if example.truth is not None:
        given = "".join(_answer(model, answer, example.truth) for model, answer in example.answers)
        truth = f"<span class='chip'>truth: <b>{answer_word(example.truth)}</b></span>"
        answers = f"<p class='answers'>{truth}{given}</p>"
    images = "".join(_image_block(example, index) for index in range(len(example.images)))
    return (
        f"<article><h2><span class='number'>{number}</span>{html.escape(example.statement)}</h2>"
        f"{answers}{images}</article>"
    )


def _answer(model: str, answer: bool, truth: bool) -> str:
    kind, mark = ("right", "✓") if answer == truth else ("wrong", "✗")
    return f"<span class='chip {kind}'>{html.escape(model)}: <b>{answer_word(answer)}</b> {mark}</span>"


def _image_block(example: Example, index: int) -> str:
    image = example.images[index]
    rows = "".join(_layer_row(patches, image, index) for patches in example.kept_patches)
    whole = _picture(image.permute(1, 2, 0), f"image {index + 1}", "whole")
    return f"<section>{whole}<div class='rows'>{rows}</div></section>"


def _layer_row(patches: KeptPatches, image: Tensor, index: int) -> str:
    panels = []
    for site, (label, kept) in enumerate(zip(patches.layers, patches.kept, strict=True)):
        caption = f"{label}: {int(kept[index].sum())}/{kept[index].numel()}"
        panels.append(_picture(patches.faded(site, image, index), caption, "panel"))
    return f"<div class='row'><span class='model'>{html.escape(patches.model)}</span>{''.join(panels)}</div>"


def _picture(pixels: Tensor, caption: str, kind: str) -> str:
    """A figure element that holds the picture, uint8 ``[H, W, 3]``, as a data URI."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, pixels.numpy(), format="png")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    caption = html.escape(caption)
    return (
        f"<figure class='{kind}'><img alt='{caption}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )
