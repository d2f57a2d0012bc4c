"""Compression of a model on scenes: ``madtp compress -r 0.8 -c zoo/recipes/blip_vqa_mini_compress.toml``.

All tasks alike: ``objectives/scenes.py`` says what each learns, ``compression.py`` prunes and steers. The same recipe trains
the controls: ``pruning`` holds fields of :class:`madtp.PruningConfig`, such as ``selection = "random"``.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from torch import nn

import zoo
from madtp.training.batch_shares import Batch
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import TrainingResult
from madtp.training.number_ranges import SEED, SHARE, WEIGHT, Range, whole
from zoo.objectives.scenes import PADDING, AnySceneObjective, scene_objective
from zoo.recipes.compression import CompressionLearner, SampleSource, compression_learner, finish_compression
from zoo.recipes.compression_settings import CompressionSettings
from zoo.recipes.model_card import held_out_calls, test_task

_EVALUATION_SAMPLES = 256


@dataclass(frozen=True)
class CompressSceneSettings(CompressionSettings):
    """Settings of this recipe, besides those of every compression.

    Attributes:
        pictures_per_step: Pictures in a batch, or pairs of pictures for statements; each is encoded once.
        texts_per_picture: Texts about each.
        auxiliary_weight: Weight of the auxiliary losses, which dense training has, too.
        fade_to: Fraction of that weight that is left at the end.
        data_seed: Edition of the data.
        first_pair: First pair of pictures that training takes.
        calibration_items: Held-out samples to calibrate on.
        test_items: Held-out samples to test on.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        **CompressionSettings.RANGES,
        "pictures_per_step": whole(1, 10**6),
        "texts_per_picture": whole(1, 10**4),
        "auxiliary_weight": WEIGHT,
        "fade_to": SHARE,
        "data_seed": SEED,
        "first_pair": whole(0),
        "calibration_items": whole(1),
        "test_items": whole(1),
    }

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


SceneLearner: TypeAlias = CompressionLearner[AnySceneObjective, CompressSceneSettings]


def build(settings: Mapping[str, object], training: TrainingConfig) -> SceneLearner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(CompressSceneSettings, settings, "settings")
    torch.manual_seed(training.seed)
    objective = objective_of(chosen, zoo.create(chosen.model, chosen.checkpoint))
    return compression_learner(objective, scene_source(objective, chosen), chosen, training)


def objective_of(settings: CompressSceneSettings, model: nn.Module) -> AnySceneObjective:
    """Return what these settings let a model of their kind learn."""
    objective = scene_objective(model, settings.texts_per_picture)
    objective.auxiliary_weight, objective.fade_to = settings.auxiliary_weight, settings.fade_to
    return objective


def scene_source(objective: AnySceneObjective, settings: CompressSceneSettings) -> SampleSource:
    """Return the source of the scenes that the settings ask for."""

    def batch(step: int, rows: range) -> Batch:
        start = step * settings.pictures_per_step
        return objective.batch(settings.data_seed, "train", settings.first_pair, start, rows)

    return SampleSource(
        batch=batch,
        samples_per_step=settings.pictures_per_step,
        sample_name=objective.samples,
        held_out=lambda: objective.held_out(settings.data_seed, _EVALUATION_SAMPLES),
        scores=objective.scores,
        padding=PADDING,
    )


def finish(learner: SceneLearner, result: TrainingResult, output: Path) -> None:
    """Calibrate on held-out samples, and write the folder ``pruned`` with its card ``card.json``."""
    del result
    write_pruned(learner, output)


def write_pruned(learner: SceneLearner, output: Path) -> None:
    """Do as :func:`finish`, whether or not the model was fine-tuned."""
    chosen, data = learner.settings, learner.objective.data
    calls = held_out_calls(chosen.model, data, split="val", items=chosen.calibration_items, seed=chosen.data_seed)

    def test(model: nn.Module) -> dict[str, object]:
        return test_task(model, chosen.model, data, items=chosen.test_items, seed=chosen.data_seed)

    finish_compression(learner, calls, test, output)
