"""Compression of a model of one picture on scenes: `madtp compress -r 0.8 -c zoo/recipes/blip_vqa_mini_compress.toml`.

Captions, questions and retrieval alike: `lessons.py` says what each learns, `compression.py` prunes and steers. The same recipe
trains the controls: `pruning` holds fields of `madtp.PruningConfig`, such as `selection = "random"`.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Learner, TrainingResult
from madtp.training.parts import Batch
from zoo.recipes.card import held_out_calls, test_task
from zoo.recipes.compression import Source, compression_learner, finish_compression
from zoo.recipes.lessons import PADDING, Lesson, lesson_for
from zoo.recipes.subject import CompressionSettings

_AT_ONCE = 64


@dataclass(frozen=True)
class Settings(CompressionSettings):
    """What the recipe can be told, beside what all that compress can.

    Attributes:
        pictures_per_step, texts_per_picture: batch; each picture is encoded once.
        content_weight: of the auxiliary loss of retrieval, which dense training uses, too; it fades to `fade_to`.
        data_seed: edition of the data; training takes pairs from `first_pair` on.
        calibration_items, test_items: held-out samples for calibration and test.
    """

    model: str = "blip_vqa_mini"
    checkpoint: str | None = "dense"
    pictures_per_step: int = 48
    texts_per_picture: int = 4
    content_weight: float = 1.0
    fade_to: float = 0.1
    data_seed: int = 0
    first_pair: int = 3_000_000
    calibration_items: int = 256
    test_items: int = 1024


def build(settings: Mapping[str, Any], training: TrainingConfig) -> Learner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(Settings, settings, "settings")
    torch.manual_seed(training.seed)
    lesson = lesson_for(chosen.model, chosen.checkpoint, chosen.texts_per_picture)
    lesson.content_weight, lesson.fade_to = chosen.content_weight, chosen.fade_to
    learner = compression_learner(lesson, lesson_source(lesson, chosen), chosen, training)
    object.__setattr__(learner.module, "lesson", lesson)
    return learner


def lesson_source(lesson: Lesson, settings: Settings) -> Source:
    """Scenes as a recipe's settings ask for them."""

    def batch(step: int, rows: range) -> Batch:
        return lesson.batch(settings.data_seed, "train", settings.first_pair, step * settings.pictures_per_step, rows)

    def held_out() -> list[Batch]:
        return [lesson.batch(settings.data_seed, "val", 0, start, range(_AT_ONCE)) for start in range(0, 256, _AT_ONCE)]

    return Source(batch, settings.pictures_per_step, "pictures", held_out, lesson.scores, PADDING)


def finish(learner: Learner, result: TrainingResult, output: Path) -> None:
    """Calibrate on held-out samples, write the folder `pruned` and its card `card.json`."""
    chosen = from_plain(Settings, learner.card["settings"], "settings")
    lesson = cast(Lesson, learner.module.lesson)
    calls = held_out_calls(chosen.model, lesson.data, "val", chosen.calibration_items, chosen.data_seed)

    def test(model: torch.nn.Module) -> dict[str, Any]:
        return test_task(model, chosen.model, lesson.data, chosen.test_items, chosen.data_seed)

    finish_compression(lesson, learner, chosen, calls, test, output)
