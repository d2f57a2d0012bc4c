"""Compression of a published model on its data set: `madtp compress -r 0.5 -c zoo/recipes/blip_nlvr.toml`.

The settings of the paper are config files beside this one. `objectives/paper.py` says what each task learns,
`data_loader.py` opens samples, `compression.py` prunes and steers.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import zoo
from madtp.errors import ConfigError
from madtp.evaluation import evaluate
from madtp.training.batch_shares import Batch
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Learner, TrainingResult
from zoo.datasets.records import DataSet
from zoo.objectives.base import CompressionSettings
from zoo.objectives.paper import Contrast, Course, course_for
from zoo.recipes.compression import Source, compression_learner, finish_compression
from zoo.recipes.data_loader import Loader
from zoo.tasks import build_task
from zoo.transforms import for_model
from zoo.transforms import training as training_transform

PADDING = {"input_ids": 0, "attention_mask": 0}


@dataclass(frozen=True)
class Settings(CompressionSettings):
    """What the recipe can be told, beside what all that compress can.

    Attributes:
        data, root: data set and its folder.
        splits: that are trained on, one after the other in the file's order before they are shuffled.
        vocabulary: `vocab.txt` of bert-base-uncased, for BLIP.
        answers: JSON list of answers that the test chooses from, for questions; "" lets the model write them.
        samples_per_step: of all processes together.
        workers: processes that open images, for each process that trains.
        smallest_crop: least share of an image that training sees.
        queue, momentum, alpha, alpha_ramp: of the contrast of retrieval, see :class:`zoo.objectives.paper.Contrast`.
        calibration_split, calibration_items, test_split, test_items: samples for calibration and test; 0 tests all.
        evaluation_batch: samples of a call in calibration and test.
    """

    data: str = ""
    root: str = ""
    splits: tuple[str, ...] = ("train",)
    vocabulary: str = ""
    answers: str = ""
    samples_per_step: int = 128
    workers: int = 4
    smallest_crop: float = 0.5
    queue: int = 57_600
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_ramp: float = 0.2
    calibration_split: str = "train"
    calibration_items: int = 256
    test_split: str = "test"
    test_items: int = 0
    evaluation_batch: int = 32
    teaching_steps: int = 0

    @property
    def contrast(self) -> Contrast:
        """How retrieval is trained."""
        return Contrast(self.queue, self.momentum, self.alpha, self.alpha_ramp)


def build(settings: Mapping[str, Any], training: TrainingConfig) -> Learner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(Settings, settings, "settings")
    torch.manual_seed(training.seed)
    model = zoo.create(chosen.model, chosen.checkpoint)
    data = _training_data(chosen)
    course = course_for(chosen.model, model, _task(chosen, model, data), chosen.contrast)
    loader = Loader(course.samples(data), chosen.samples_per_step, training.seed, chosen.workers)

    def batch(step: int, rows: range) -> Batch:
        return course.batch([course.vary(sample, chance) for sample, chance in loader.open(step, rows)])

    source = Source(batch, chosen.samples_per_step, "samples", list, lambda outputs, batches: {}, PADDING)
    learner = compression_learner(course, source, chosen, training)
    object.__setattr__(learner.module, "course", course)
    return learner


def _training_data(chosen: Settings) -> DataSet[Any]:
    entry = zoo.describe(chosen.model)
    transform = training_transform(entry.input_size[1], entry.mean, entry.std, chosen.smallest_crop)
    parts = [zoo.data(chosen.data, chosen.root or None, split, transform=transform) for split in chosen.splits]
    if not parts:
        raise ConfigError('settings.splits is empty; it takes ["train"], say')
    return parts[0].with_records([record for part in parts for record in part.records])


def _task(chosen: Settings, model: Any, data: DataSet[Any]) -> Any:
    vocabulary, answers = (Path(name) if name else None for name in (chosen.vocabulary, chosen.answers))
    return build_task(chosen.model, model, data, torch.device("cpu"), vocabulary, answers)


def finish(learner: Learner, result: TrainingResult, output: Path) -> None:
    """Calibrate on held-out samples, write the folder `pruned` and its card `card.json`."""
    chosen = from_plain(Settings, learner.card["settings"], "settings")
    course = cast(Course, learner.module.course)

    def task(split: str, items: int) -> Any:
        data = zoo.data(chosen.data, chosen.root or None, split, transform=for_model(chosen.model), limit=items or None)
        return _task(chosen, course.model, data)

    def calls() -> Sequence[Mapping[str, Any]]:
        held_out, size = task(chosen.calibration_split, chosen.calibration_items), chosen.evaluation_batch
        count = len(held_out.ids)
        return [held_out.inputs(range(start, min(start + size, count))) for start in range(0, count, size)]

    def test(model: torch.nn.Module) -> dict[str, Any]:
        found = evaluate(model, task(chosen.test_split, chosen.test_items), batch_size=chosen.evaluation_batch)
        return {"split": chosen.test_split, "items": len(found.samples), "metrics": found.metrics}

    finish_compression(course, learner, chosen, calls(), test, output)
