"""Runs the demonstration from data to files; see :func:`run_demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from madtp.demo.measure import inputs_of, measure, steps
from madtp.demo.models import Contender, load_contenders
from madtp.demo.table import measurement_table
from madtp.errors import DataError
from madtp.pictures import Example, Measurement, Survival, draw_figure, write_page

if TYPE_CHECKING:
    from zoo.scenes import Batch, Item

BATCH = 32
EXAMPLES = 4
PICTURE, PAGE = "madtp-demo.png", "madtp-demo.html"


@dataclass(frozen=True)
class DemoResult:
    """What was measured, and the files that were written."""

    measurements: tuple[Measurement, ...]
    picture: Path
    page: Path


def run_demo(output: Path, *, samples: int, seed: int, console: Console, weights: Path | None = None) -> DemoResult:
    """Measure the shipped models on `samples` held-out scenes, print the table, write picture and page to `output`.

    `seed` is the edition of the scenes, and chooses which of them are drawn as examples. `weights`: folder of the
    models, default the shipped one.

    Raises:
        DataError: no sample was asked for.
        CheckpointError: the weights are missing or damaged.
    """
    if samples < 1:
        raise DataError(f"{samples} samples were asked for; at least 1 is needed.")
    from zoo.scenes import SceneDataset, collate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        loading = progress.add_task("loading models", total=None)
        contenders = load_contenders(weights)
        progress.remove_task(loading)
        drawing = progress.add_task("drawing scenes", total=samples)
        items = []
        dataset = SceneDataset("test", samples, seed=seed)
        for index in range(samples):
            items.append(dataset[index])
            progress.advance(drawing)
        # Statements of like length share a batch, so that the dense model is not charged for padding.
        items.sort(key=lambda item: len(item["statement"].split()))
        batches = [collate(items[start : start + BATCH]) for start in range(0, samples, BATCH)]
        progress.remove_task(drawing)
        measuring = progress.add_task("measuring", total=steps(len(contenders), len(batches)))
        measurements = measure(contenders, batches, lambda: progress.advance(measuring))
        chosen = choose_examples(items, EXAMPLES, seed)
        examples = explain(contenders, chosen, collate(chosen))
    threads = torch.get_num_threads()
    note = (
        f"{samples} held-out scenes; time on CPU, {threads} thread{'s' * (threads > 1)}, batches of "
        f"{min(BATCH, samples)}. Token counts are means."
    )
    console.print(measurement_table(measurements, f"{note} MACs: multiply-accumulates, the field's “FLOPs”."))
    picture = draw_figure(examples, output / PICTURE)
    page = write_page(examples, measurements, output / PAGE, title="madtp demo", note=note)
    return DemoResult(tuple(measurements), picture, page)


def choose_examples(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    """At most `most` items of different kinds of statement, chosen by `seed` and not by how they are answered."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    by_kind: dict[str, list[int]] = {}
    for index in order:
        by_kind.setdefault(items[index]["kind"], []).append(index)
    rounds = max(len(indices) for indices in by_kind.values())
    turns = [indices[turn] for turn in range(rounds) for indices in by_kind.values() if turn < len(indices)]
    return [items[index] for index in turns[:most]]


@torch.inference_mode()
def explain(contenders: Sequence[Contender], items: Sequence[Item], batch: Batch) -> list[Example]:
    """Answers of every contender to `items`, and the patches that pruned ones keep; `batch` holds the same items."""
    answers: list[tuple[str, list[bool]]] = []
    kept: list[tuple[str, list[tuple[str, Tensor]]]] = []
    for contender in contenders:
        logits = contender.model(**inputs_of(batch))
        answers.append((contender.name, logits.argmax(-1).bool().tolist()))
        if contender.pruned:
            kept.append((contender.name, _kept_patches(contender.model, len(items))))
    return [
        Example(
            statement=item["statement"],
            truth=bool(item["label"]),
            images=item["images"],
            answers=tuple((name, answered[index]) for name, answered in answers),
            survivals=tuple(
                Survival(name, tuple(label for label, _ in sites), tuple(masks[index] for _, masks in sites))
                for name, sites in kept
            ),
        )
        for index, item in enumerate(items)
    ]


def _kept_patches(model: Any, batch: int) -> list[tuple[str, Tensor]]:
    """(label, bool [batch, images, patches]) of each image site, from masks [images * batch, 1 + patches].

    The vision tower runs on all first images, then on all second ones.
    """
    kept = model.kept_tokens()
    names = [site.name for site in model.report.sites if site.modality == "image"]
    return [
        (f"layer {number}", kept[name][:, 1:].unflatten(0, (-1, batch)).transpose(0, 1).cpu())
        for number, name in enumerate(names, start=1)
    ]
