"""Compression of a published model on its data set: ``madtp compress -r 0.5 -c zoo/recipes/blip_nlvr.toml``.

The settings of the paper are config files beside this one. ``objectives/paper.py`` says what each task learns,
``data_loader.py`` opens samples, ``compression.py`` prunes and steers.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

import zoo
from madtp.errors import ConfigError
from madtp.evaluation import Task, evaluate
from madtp.training.batch_shares import Batch
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import TrainingResult
from madtp.training.number_ranges import MOST_PROCESSES, SHARE, Range, whole
from zoo.datasets.records import DataSet
from zoo.objectives.paper import AnyPaperObjective, ContrastSettings, paper_objective
from zoo.recipes.compression import CompressionLearner, SampleSource, compression_learner, finish_compression
from zoo.recipes.compression_settings import CompressionSettings
from zoo.recipes.data_loader import Loader
from zoo.tasks import build_task
from zoo.tasks.fingerprints import fingerprint_data, fingerprint_files
from zoo.transforms import for_model
from zoo.transforms import training as training_transform

PADDING = {"input_ids": 0, "attention_mask": 0}


@dataclass(frozen=True)
class CompressDataSettings(CompressionSettings):
    """Settings of this recipe, besides those of every compression.

    Attributes:
        data: Name of the data set.
        root: Folder of the data set.
        splits: Splits that are trained on, joined in this order before they are shuffled.
        vocabulary: ``vocab.txt`` of bert-base-uncased, for BLIP.
        answers: JSON list of answers that the test chooses from, for questions; "" lets the model write them.
        samples_per_step: Samples of a step, of all processes together.
        workers: Processes that open images, for each process that trains.
        smallest_crop: Least share of an image that a training crop covers.
        queue: See :class:`zoo.objectives.paper.ContrastSettings`, for retrieval.
        momentum: Its ``decay``.
        alpha: See there.
        alpha_ramp: See there.
        calibration_split: Split to calibrate on.
        calibration_items: Samples to calibrate on.
        test_split: Split to test on.
        test_items: Samples to test on; 0 tests on all.
        evaluation_batch: Samples of a call in calibration and test.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        **CompressionSettings.RANGES,
        "samples_per_step": whole(1, 10**6),
        "workers": whole(0, MOST_PROCESSES),
        "smallest_crop": Range(0, 1, above=True),
        "queue": whole(1, 10**8),
        "momentum": SHARE,
        "alpha": SHARE,
        "alpha_ramp": SHARE,
        "calibration_items": whole(1),
        "test_items": whole(0),
        "evaluation_batch": whole(1, 10**6),
    }

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
    def contrast(self) -> ContrastSettings:
        """How retrieval is trained."""
        return ContrastSettings(self.queue, self.momentum, self.alpha, self.alpha_ramp)


DataLearner: TypeAlias = CompressionLearner[AnyPaperObjective, CompressDataSettings]


def build(settings: Mapping[str, object], training: TrainingConfig) -> DataLearner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(CompressDataSettings, settings, "settings")
    objective, source = objective_and_source(chosen, training)
    return compression_learner(objective, source, chosen, training)


def objective_and_source(
    chosen: CompressDataSettings, training: TrainingConfig
) -> tuple[AnyPaperObjective, SampleSource]:
    """Return what the model of these settings learns, and where its samples come from."""
    torch.manual_seed(training.seed)
    model = zoo.create(chosen.model, chosen.checkpoint)
    data = _training_data(chosen)
    objective = paper_objective(chosen.model, model, _task(chosen, model, data), chosen.contrast)
    loader = Loader(objective.training_samples(data), chosen.samples_per_step, training.seed, chosen.workers)

    def batch(step: int, rows: range) -> Batch:
        return objective.batch([objective.vary(sample, draw) for sample, draw in loader.open(step, rows)])

    return objective, SampleSource(
        batch=batch,
        samples_per_step=chosen.samples_per_step,
        sample_name="samples",
        held_out=list,
        scores=lambda outputs, batches: {},
        padding=PADDING,
        fingerprint={
            "samples": fingerprint_data(data),
            "files": fingerprint_files(Path(name) for name in (chosen.vocabulary, chosen.answers) if name),
        },
    )


def _training_data(chosen: CompressDataSettings) -> DataSet[Any]:
    entry = zoo.describe(chosen.model)
    transform = training_transform(entry.input_size[1], entry.mean, entry.std, chosen.smallest_crop)
    parts = [zoo.data(chosen.data, chosen.root or None, split, transform=transform) for split in chosen.splits]
    if not parts:
        raise ConfigError('settings.splits is empty; it takes ["train"], say')
    return parts[0].with_records([record for part in parts for record in part.records])


def _task(chosen: CompressDataSettings, model: nn.Module, data: DataSet[Any]) -> Task:
    vocabulary, answers = (Path(name) if name else None for name in (chosen.vocabulary, chosen.answers))
    return build_task(chosen.model, model, data, torch.device("cpu"), vocabulary=vocabulary, answers=answers)


def finish(learner: DataLearner, result: TrainingResult, output: Path) -> None:
    """Calibrate on held-out samples, and write the folder ``pruned`` with its card ``card.json``."""
    del result
    chosen, model = learner.settings, learner.objective.model

    def task(split: str, items: int) -> Task:
        data = zoo.data(chosen.data, chosen.root or None, split, transform=for_model(chosen.model), limit=items or None)
        return _task(chosen, model, data)

    def calls() -> Sequence[Mapping[str, Tensor]]:
        held_out, size = task(chosen.calibration_split, chosen.calibration_items), chosen.evaluation_batch
        count = len(held_out.ids)
        return [held_out.inputs(range(start, min(start + size, count))) for start in range(0, count, size)]

    def test(model: nn.Module) -> dict[str, object]:
        found = evaluate(model, task(chosen.test_split, chosen.test_items), batch_size=chosen.evaluation_batch)
        return {"split": chosen.test_split, "items": len(found.samples), "metrics": found.metrics}

    finish_compression(learner, calls(), test, output)
