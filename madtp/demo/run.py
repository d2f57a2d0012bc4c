"""Run the demonstration, from data to files: :func:`run_demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from madtp.atomic_files import check_writable_folder
from madtp.demo.measure import inputs_of, measure, steps
from madtp.demo.models import Entry, PrunedEntry, load_models
from madtp.demo.table import measurement_table
from madtp.errors import DataError
from madtp.pictures import Example, KeptPatches, Measurement, draw_figure, write_page
from madtp.pruned import PrunedModel

if TYPE_CHECKING:
    from zoo.scenes import Batch, Item

BATCH = 32
EXAMPLES = 4
PICTURE, PAGE = "madtp-demo.png", "madtp-demo.html"


@dataclass(frozen=True)
class DemoResult:
    """The measurements, and the files that were written."""

    measurements: tuple[Measurement, ...]
    picture: Path
    page: Path


def run_demo(output: Path, *, samples: int, seed: int, console: Console, weights: Path | None = None) -> DemoResult:
    """Measure the shipped models on held-out scenes, print the table, and write picture and page.

    Args:
        output: folder for picture and page.
        samples: number of held-out scenes.
        seed: edition of the scenes; it also chooses which of them are drawn as examples.
        console: where to print.
        weights: folder of the models; ``None`` takes the shipped ones.

    Raises:
        DataError: if ``samples`` is below 1.
        CheckpointError: if the weights are missing or damaged, or if ``output`` cannot be written.
    """
    if samples < 1:
        raise DataError(f"{samples} samples were asked for; at least 1 is needed.")
    check_writable_folder(output)
    from zoo.scenes import SceneDataset, collate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        loading = progress.add_task("loading models", total=None)
        entries = load_models(weights)
        progress.remove_task(loading)
        drawing = progress.add_task("drawing scenes", total=samples)
        items = []
        dataset = SceneDataset("test", samples, seed=seed)
        for index in range(samples):
            items.append(dataset[index])
            progress.advance(drawing)
        # Statements of similar length share a batch, so that the dense model is not charged for padding.
        items.sort(key=lambda item: len(item["statement"].split()))
        batches = [collate(items[start : start + BATCH]) for start in range(0, samples, BATCH)]
        progress.remove_task(drawing)
        measuring = progress.add_task("measuring", total=steps(len(entries), len(batches)))
        measurements = measure(entries, batches, lambda: progress.advance(measuring))
        chosen = choose_examples(items, EXAMPLES, seed)
        examples = explain(entries, chosen, collate(chosen))
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
    """Choose at most ``most`` items of different kinds of statement, by ``seed`` and not by how they are answered."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    by_kind: dict[str, list[int]] = {}
    for index in order:
        by_kind.setdefault(items[index]["kind"], []).append(index)
    rounds = max(len(indices) for indices in by_kind.values())
    turns = [indices[turn] for turn in range(rounds) for indices in by_kind.values() if turn < len(indices)]
    return [items[index] for index in turns[:most]]


@torch.inference_mode()
def explain(entries: Sequence[Entry], items: Sequence[Item], batch: Batch) -> list[Example]:
    """Return, for each item, the answers of every model and the patches that pruned ones keep.

    Args:
        entries: the models.
        items: the samples.
        batch: the same samples as a batch.
    """
    answers: list[tuple[str, list[bool]]] = []
    kept: list[tuple[str, list[tuple[str, Tensor]]]] = []
    for entry in entries:
        logits: Tensor = entry.model(**inputs_of(batch))
        answers.append((entry.name, logits.argmax(-1).bool().tolist()))
        if isinstance(entry, PrunedEntry):
            kept.append((entry.name, _kept_by_layer(entry.model, len(items))))
    return [
        Example(
            statement=item["statement"],
            truth=bool(item["label"]),
            images=item["images"],
            answers=tuple((name, answered[index]) for name, answered in answers),
            kept_patches=tuple(
                KeptPatches(name, tuple(label for label, _ in sites), tuple(masks[index] for _, masks in sites))
                for name, sites in kept
            ),
        )
        for index, item in enumerate(items)
    ]


def _kept_by_layer(model: PrunedModel, batch: int) -> list[tuple[str, Tensor]]:
    """Label of each image site, and which patches it keeps, bool ``[batch, images, patches]``.

    The masks of the sites are ``[images * batch, 1 + patches]``: the vision tower runs on all first images, then on all second
    ones.
    """
    kept = model.madtp.kept_tokens()
    names = [site.name for site in model.madtp.report.sites if site.modality == "image"]
    patches = [kept[name][:, 1:] for name in names]
    return [
        (f"layer {number}", masks.reshape(-1, batch, masks.shape[1]).transpose(0, 1).cpu())
        for number, masks in enumerate(patches, start=1)
    ]
