"""Pictures of the documentation that show what the library computes: a decision, a graph, survivors, speed."""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charts import COLOURS, Axes, legend
from svg import NOTE, Drawing

if TYPE_CHECKING:
    from madtp.report import RewriteReport

DOCS = Path(__file__).parent.parent
SCENES, SEED = 64, 0
SHOWN = (
    ("blip_nlvr_mini", "visual_encoder", "reasoning"),
    ("blip_vqa_mini", "visual_encoder", "questions"),
    ("clip_mini", "visual", "CLIP retrieval"),
)
"""Models whose survivors are drawn, the path of their vision tower, and a name for people."""


def decision() -> Drawing:
    """Made-up scores of twelve tokens and what becomes of them, by the functions of ``madtp.method``."""
    import torch

    from madtp.method.merging import merge_weights
    from madtp.method.threshold import keep_mask, threshold

    generator = torch.Generator().manual_seed(3)
    terms = torch.rand(3, 12, generator=generator) ** 1.5
    terms = terms / terms.sum(1, keepdim=True)
    scores = terms.mean(0, keepdim=True)
    liking = torch.randn(1, 12, 4, generator=generator)
    theta = threshold(liking, scores, None, 1.0)
    kept = torch.from_numpy(keep_mask(scores.numpy(), theta.numpy(), 1.0, None))
    weights = merge_weights(scores, ~kept)[0]

    drawing = Drawing(560, 400, "Three scores, their mean, the threshold, and the merged token")
    names = ("s1  attention received", "s2  alignment", "s3  class attention")
    place = [172 + 30 * token for token in range(12)]
    for row, (name, values) in enumerate(zip(names, terms, strict=True)):
        base = 62 + 56 * row
        drawing.text(160, base - 4, name, size=13, anchor="end")
        for x, value in zip(place, values.tolist(), strict=True):
            drawing.box(x, base - 190 * value, 22, 190 * value, fill="plain")
    base = 300
    drawing.text(160, base - 46, "S  importance,", size=13, anchor="end", bold=True)
    drawing.text(160, base - 28, "their mean", size=13, anchor="end")
    for x, value, stays in zip(place, scores[0].tolist(), kept[0].tolist(), strict=True):
        drawing.box(x, base - 260 * value, 22, 260 * value, fill="madtp" if stays else "dropped")
    level = base - 260 * float(theta)
    drawing.line((166, level), (532, level), width=1.6, dashed=True)
    drawing.text(538, level + 4, "γ θ", size=13, anchor="start")
    drawing.text(160, 350, "survivors", size=13, anchor="end")
    x = 172.0
    for number, stays in enumerate(kept[0].tolist()):
        if stays:
            drawing.box(x, 334, 22, 22, str(number + 1), fill="madtp", size=11)
            x += 30
    drawing.box(x, 334, 22, 22, "m", fill="merged", size=11)
    used = int((weights > 0).sum())
    drawing.text(172, 382, f"m: one token for the {used} others, their mean weighted by S", size=13, anchor="start")
    return drawing


def small_clip() -> tuple[Any, dict[str, Any]]:
    """A CLIP of transformers with two layers a tower and random weights, and inputs."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(SEED)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 0},
        projection_dim=16,
    )
    images, ids = torch.randn(4, 3, 32, 32), torch.randint(3, 50, (4, 8))
    return CLIPModel(config).eval(), {"pixel_values": images, "input_ids": ids}


@functools.cache
def clip_report() -> RewriteReport:
    """The report of the rewrite of the small CLIP."""
    import madtp

    model, inputs = small_clip()
    report: RewriteReport = madtp.rewrite(model, inputs).report
    return report


def graph_before() -> Drawing:
    """Streams and blocks of a small CLIP, as the report of its rewrite names them."""
    return graph(clip_report(), "what is found", after=False)


def graph_after() -> Drawing:
    """The same with the sites that were inserted."""
    return graph(clip_report(), "what is made of it", after=True)


def graph(report: RewriteReport, title: str, *, after: bool) -> Drawing:
    """Draw the streams of a model side by side, with their blocks below each other.

    Args:
        report: of a rewrite.
        title: heading of the drawing.
        after: whether the sites and the alignment tokens are drawn, too.
    """
    streams = sorted(report.streams, key=lambda stream: stream.modality)
    depth = max(sum(block.stream == stream.index for block in report.blocks) for stream in streams)
    row, top, wide = 118, 78, 122
    drawing = Drawing(330, top + row * depth + 74, f"{report.model}: {title}")
    middle, below = drawing.width / 2, top + row * depth
    drawing.text(middle, 24, title, size=15, bold=True)
    sites = {site.name for site in report.sites}
    for column, stream in enumerate(streams):
        x = 6 + column * (drawing.width - 12 - wide)
        axis, y = x + wide / 2, float(top)
        drawing.box(x, 40, wide, 26, f"{stream.modality}, width {stream.width}", fill=stream.modality, size=12)
        drawing.arrow((axis, 66), (axis, y))
        for block in (block for block in report.blocks if block.stream == stream.index):
            number = re.findall(r"\d+", block.path)[-1]
            drawing.box(x, y, wide, 26, f"{block.kind}-attention {number}", fill=stream.modality, size=12)
            if after and block.path in sites:
                drawing.arrow((axis, y + 26), (axis, y + 42))
                drawing.box(x, y + 42, wide, 26, "prune and merge", fill="madtp", size=12)
                drawing.arrow((axis, y + 68), (axis, y + 82))
                drawing.line((x + wide if axis < middle else x, y + 55), (middle, y + 55), dashed=True)
            else:
                drawing.arrow((axis, y + 26), (axis, y + 82))
            drawing.box(x, y + 82, wide, 26, f"feed-forward {number}", fill=stream.modality, size=12)
            y += row
            drawing.arrow((axis, y - 10), (axis, y))
        drawing.box(x, y, wide, 26, "class token" if stream.modality == "image" else "end of text", size=12)
    if after:
        drawing.line((middle, top + 55), (middle, below + 40), dashed=True)
        drawing.box(middle - 62, below + 40, 124, 26, "alignment tokens", fill="madtp", size=12)
    return drawing


@dataclass(frozen=True)
class Survival:
    """Tokens alive behind each layer of one model.

    Attributes:
        mean: share of the tokens, by layer; the first is in front of all layers.
        low: what a tenth of the images stays below.
        high: what a tenth of the images exceeds.
    """

    mean: list[float]
    low: list[float]
    high: list[float]


def survival(model: str, tower: str, checkpoint: str) -> Survival:
    """Run a shipped model on held-out scenes, and count the original image tokens that are left behind each layer."""
    import torch

    import zoo
    from zoo.recipes.model_card import held_out_calls

    data = "scenes" if "nlvr" in model else "scenes_questions" if "vqa" in model else "scenes_captions"
    pruned = zoo.create(model, checkpoint)
    shares: dict[str, list[float]] = {}
    for call in held_out_calls(model, data, split="test", items=SCENES, seed=SEED, batch_size=16):
        with torch.inference_mode():
            pruned(**call)
        for site, kept in pruned.madtp.kept_tokens().items():
            if site.startswith(tower):
                shares.setdefault(site, []).extend(kept.float().mean(1).tolist())
    tenths = [statistics.quantiles(found, n=10) for found in shares.values()]
    return Survival(
        mean=[1.0, *(statistics.mean(found) for found in shares.values())],
        low=[1.0, *(tenth[0] for tenth in tenths)],
        high=[1.0, *(tenth[-1] for tenth in tenths)],
    )


def survivors() -> Drawing:
    """Image tokens alive behind each layer of models that ship, at half and at a fifth of the MACs."""
    drawing = Drawing(600, 330, "Image tokens that survive each layer of the shipped models")
    for panel, (checkpoint, title) in enumerate((("pruned-50", "50% fewer MACs"), ("pruned-80", "80% fewer MACs"))):
        found = [survival(model, tower, checkpoint) for model, tower, _ in SHOWN]
        layers = max(len(one.mean) for one in found) - 1
        axes = Axes(drawing, (56 + 284 * panel, 36, 236, 194), (0, layers), (0, 1))
        axes.frame(
            [(layer, str(layer)) for layer in range(layers + 1)],
            [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)],
        )
        for one, colour in zip(found, COLOURS, strict=False):
            xs = list(range(len(one.mean)))
            axes.spread(xs, one.low, one.high, colour=colour)
            axes.curve(list(zip(xs, one.mean, strict=True)), colour=colour)
        drawing.text(56 + 284 * panel + 118, 22, title, size=14)
        drawing.text(56 + 284 * panel + 118, 270, "layer", size=13)
    for number, ((model, _, name), colour) in enumerate(zip(SHOWN, COLOURS, strict=False)):
        x = 20 + 196 * number
        drawing.dot(x, 304, colour=colour)
        drawing.text(x + 10, 308.5, f"{name} ({model})", size=11.5, anchor="start")
    return drawing


SPEED = re.compile(r"^\| (\d+) \| pruned −(\d+)% \| \d+ \| ([\d.]+) \| ([\d.]+) \|", re.M)
MINIS = re.compile(r"^\| *(`\w+`)? *\| 32 \|(?:[^|]*\|){2} ([\d.]+) \(([\d.]+)\) \| ([\d.]+) \(([\d.]+)\) \|", re.M)


def speed_points(page: str) -> dict[str, list[tuple[float, float]]]:
    """Read ``(MACs divided by, speed-up)`` by series from the tables of the page on time.

    Args:
        page: text of ``docs/performance.md``.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for title, name in (("## ViT-B/16 at 384 pixels", "ViT-B/16"), ("## BLIP for pairs of pictures", "BLIP-NLVR base")):
        section = page.partition(title)[2].partition("\n## ")[0]
        first = section.partition("Two threads")[0]
        for batch, _, speed, macs in SPEED.findall(first):
            points.setdefault(f"{name}, batch {batch}", []).append((float(macs), float(speed)))
    minis = page.partition("## The minis")[2].partition("\n## ")[0]
    points["five minis, batch 32"] = [
        pair
        for row in MINIS.findall(minis)
        for pair in ((float(row[2]), float(row[1])), (float(row[4]), float(row[3])))
    ]
    return points


def speed() -> Drawing:
    """Speed-up against the factor by which MACs fall, from the tables of ``docs/performance.md``."""
    points = speed_points((DOCS / "performance.md").read_text(encoding="utf-8"))
    drawing = Drawing(600, 380, "Speed-up against the factor by which MACs fall")
    axes = Axes(drawing, (64, 20, 320, 290), (1, 5.5), (1, 5.5))
    ticks = [(value, f"{value}×") for value in range(1, 6)]
    axes.frame(ticks, ticks)
    axes.curve([(1, 1), (5.5, 5.5)], colour=NOTE, dots=False, dashed=True)
    drawing.text(404, 40, "dashed: as much time", size=12, anchor="start")
    drawing.text(404, 56, "as MACs saved", size=12, anchor="start")
    for (_, series), colour in zip(points.items(), COLOURS, strict=False):
        draw_points(axes, series, colour=colour)
    legend(drawing, 410, 92, list(zip(points, COLOURS, strict=False)))
    drawing.text(224, 352, "MACs of the dense model / MACs of the pruned model", size=13)
    drawing.text(64, 374, "one CPU thread, float32, AMD EPYC; above the axis: times faster", size=12, anchor="start")
    return drawing


def draw_points(axes: Axes, points: Sequence[tuple[float, float]], *, colour: str) -> None:
    """Draw points of data without a line."""
    for x, y in points:
        pixel_x, pixel_y = axes.at(x, y)
        axes.drawing.dot(pixel_x, pixel_y, colour=colour)
