"""Dense training of a model of one picture on scenes: `madtp train --config zoo/recipes/blip_vqa_mini.toml`.

Captions, questions and retrieval are learned alike: `objectives/scenes.py` says what each task asks for. Vision tokens
also predict what their patch shows (zoo/objectives/auxiliary_heads.py), which for the first `patch_steps` steps is the
whole loss; and the model may start from the weights of another one.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from madtp.errors import ConfigError
from madtp.training.batch_shares import Batch, Metrics
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Learner, TrainingResult
from zoo.objectives.auxiliary_heads import PatchHeads, faded
from zoo.objectives.scenes import PADDING, Lesson, PictureLesson, lesson_for
from zoo.recipes.model_card import measure_task, write_release
from zoo.recipes.warm_start import start_from


@dataclass(frozen=True)
class Settings:
    """What the recipe can be told.

    Attributes:
        model: zoo name.
        start_from: "MODEL:CHECKPOINT" of the zoo to take weights from, see :mod:`zoo.recipes.warm_start`; "" for none.
        pictures_per_step, texts_per_picture: batch.
        patch_steps: steps at the start in which only patch labels are learned.
        patch_weight, auxiliary_weight: of the auxiliary losses; they fade by a cosine to `fade_to` at the end.
        data_seed: edition of the data; training takes pairs from `first_pair` on.
        evaluation_pictures: held-out pictures of each evaluation during training.
        test_items: held-out samples that the model card reports on.
    """

    model: str = "blip_vqa_mini"
    start_from: str = "blip_nlvr_mini:dense"
    pictures_per_step: int = 48
    texts_per_picture: int = 4
    patch_steps: int = 0
    patch_weight: float = 1.0
    auxiliary_weight: float = 1.0
    fade_to: float = 0.1
    data_seed: int = 0
    first_pair: int = 2_000_000
    evaluation_pictures: int = 256
    test_items: int = 1024


class Pupil(nn.Module):
    """The module of a lesson, with what reads auxiliary answers off its tokens and outputs."""

    def __init__(self, lesson: PictureLesson) -> None:
        super().__init__()
        self.module = lesson.module
        self.heads = lesson.heads
        self.patches = PatchHeads(lesson.model.config.vision.width)


@contextmanager
def heard(tower: nn.Module) -> Iterator[list[Tensor]]:
    """What a module returns while the block lasts."""
    found: list[Tensor] = []
    handle = tower.register_forward_hook(lambda module, arguments, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def build(settings: Mapping[str, Any], training: TrainingConfig) -> Learner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(Settings, settings, "settings")
    torch.manual_seed(training.seed)
    lesson = lesson_for(chosen.model, None, chosen.texts_per_picture)
    if not isinstance(lesson, PictureLesson):
        raise ConfigError(f"{chosen.model} learns from {lesson.samples}: its recipe is zoo.recipes.nlvr_scenes")
    lesson.auxiliary_weight, lesson.fade_to = chosen.auxiliary_weight, chosen.fade_to
    if chosen.start_from:
        start_from(lesson.model, *chosen.start_from.split(":"))
    pupil = Pupil(lesson)

    def batch(step: int, rows: range) -> Batch:
        return lesson.batch(chosen.data_seed, "train", chosen.first_pair, step * chosen.pictures_per_step, rows)

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        part = max(0, step - chosen.patch_steps) / max(1, training.steps - chosen.patch_steps)
        if step < chosen.patch_steps:
            with heard(lesson.tower) as tokens:
                lesson.see(batch["images"])
            patch, shape = pupil.patches(tokens[0], batch)
            return patch, {"patch": patch.detach(), "shape": shape}
        with heard(lesson.tower) as tokens:
            output = lesson.module(**lesson.inputs(batch))
        total, metrics = lesson.losses(lesson.module, batch, output, part)
        patch, shape = pupil.patches(tokens[0], batch)
        weight = chosen.patch_weight * faded(part, chosen.fade_to)
        return total + weight * patch, {**metrics, "patch": patch.detach(), "shape": shape}

    held_out: list[Batch] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        if not held_out:
            starts = range(0, chosen.evaluation_pictures, 64)
            held_out.extend(lesson.batch(chosen.data_seed, "val", 0, start, range(64)) for start in starts)
        return lesson.scores([lesson.module(**lesson.inputs(group)) for group in held_out], held_out)

    learner = Learner(
        module=pupil,
        batch=batch,
        loss=loss,
        evaluate=evaluate,
        card={
            "model": chosen.model,
            "data": lesson.data,
            "settings": asdict(chosen),
            "training": training.to_dict(),
        },
        samples_per_step=chosen.pictures_per_step,
        sample_name=lesson.samples,
        padding=PADDING,
    )
    object.__setattr__(pupil, "lesson", lesson)
    return learner


def finish(learner: Learner, result: TrainingResult, output: Path) -> None:
    """Write `dense.safetensors` and its model card `dense.json` into the output folder."""
    chosen = from_plain(Settings, learner.card["settings"], "settings")
    lesson = cast(Lesson, learner.module.lesson)
    test = measure_task(chosen.model, lesson.data, chosen.test_items, chosen.data_seed)
    write_release(lesson.model, output / "dense.safetensors", learner.card, test)
