"""Compression of a model on scenes: `madtp compress -r 0.8 -c zoo/recipes/blip_vqa_mini_compress.toml`.

All tasks alike: `objectives/scenes.py` says what each learns, `compression.py` prunes and steers. The same recipe
trains the controls: `pruning` holds fields of `madtp.PruningConfig`, such as `selection = "random"`.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import zoo
from madtp.training.batch_shares import Batch
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Learner, TrainingResult
from zoo.objectives.base import CompressionSettings
from zoo.objectives.scenes import PADDING, Lesson, lesson_about
from zoo.recipes.compression import Source, compression_learner, finish_compression
from zoo.recipes.model_card import held_out_calls, test_task

_AT_ONCE = 64


@dataclass(frozen=True)
class Settings(CompressionSettings):
    """What the recipe can be told, beside what all that compress can.

    Attributes:
        pictures_per_step, texts_per_picture: batch; each picture (of statements, each pair) is encoded once.
        auxiliary_weight: of the auxiliary losses, which dense training uses, too; it fades to `fade_to`.
        data_seed: edition of the data; training takes pairs from `first_pair` on.
        calibration_items, test_items: held-out samples for calibration and test.
    """

    model: str = "blip_vqa_mini"
    checkpoint: str | None = "dense"
    pictures_per_step: int = 48
    texts_per_picture: int = 4
    auxiliary_weight: float = 1.0
    fade_to: float = 0.1
    data_seed: int = 0
    first_pair: int = 3_000_000
    calibration_items: int = 256
    test_items: int = 1024


def build(settings: Mapping[str, Any], training: TrainingConfig) -> Learner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(Settings, settings, "settings")
    torch.manual_seed(training.seed)
    lesson = lesson_of(chosen)
    learner = compression_learner(lesson, lesson_source(lesson, chosen), chosen, training)
    object.__setattr__(learner.module, "lesson", lesson)
    return learner


def lesson_of(settings: Settings, model: torch.nn.Module | None = None) -> Lesson:
    """What these settings teach, and to what: a model of their kind, or the one that they start from."""
    model = model or zoo.create(settings.model, settings.checkpoint)
    lesson = lesson_about(model, settings.texts_per_picture)
    lesson.auxiliary_weight, lesson.fade_to = settings.auxiliary_weight, settings.fade_to
    return lesson


def lesson_source(lesson: Lesson, settings: Settings) -> Source:
    """Scenes as a recipe's settings ask for them."""

    def batch(step: int, rows: range) -> Batch:
        return lesson.batch(settings.data_seed, "train", settings.first_pair, step * settings.pictures_per_step, rows)

    def held_out() -> list[Batch]:
        return [lesson.batch(settings.data_seed, "val", 0, start, range(_AT_ONCE)) for start in range(0, 256, _AT_ONCE)]

    return Source(batch, settings.pictures_per_step, lesson.samples, held_out, lesson.scores, PADDING)


def finish(learner: Learner, result: TrainingResult, output: Path) -> None:
    """Calibrate on held-out samples, write the folder `pruned` and its card `card.json`."""
    chosen = from_plain(Settings, learner.card["settings"], "settings")
    lesson = cast(Lesson, learner.module.lesson)
    calls = held_out_calls(chosen.model, lesson.data, "val", chosen.calibration_items, chosen.data_seed)

    def test(model: torch.nn.Module) -> dict[str, Any]:
        return test_task(model, chosen.model, lesson.data, chosen.test_items, chosen.data_seed)

    finish_compression(lesson, learner, chosen, calls, test, output)
