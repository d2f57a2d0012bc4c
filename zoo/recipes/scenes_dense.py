"""Dense training of a mini model on scenes: ``madtp train --config blip_vqa_mini``.

All tasks alike: ``objectives/scenes.py`` says what each learns. Vision tokens also predict what their patch shows
(``objectives/auxiliary_heads.py``), which for the first ``patch_steps`` steps is the whole loss. The model may start from the
weights of another one.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import zoo
from madtp.errors import ConfigError
from madtp.training.batch_shares import Batch, Metrics
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Learner, TrainingResult
from madtp.training.number_ranges import SEED, SHARE, WEIGHT, Range, check_numbers, whole
from zoo.objectives.scene_statements import StatementObjective
from zoo.objectives.scenes import PADDING, AnyDenseObjective, dense_scene_objective
from zoo.recipes.model_card import measure_task, write_release
from zoo.recipes.warm_start import start_from
from zoo.tasks.fingerprints import fingerprint_checkpoint


@dataclass(frozen=True)
class DenseSceneSettings:
    """Settings of this recipe.

    Attributes:
        model: Name in the zoo.
        start_from: Weights of the zoo to start from, "MODEL:CHECKPOINT", see :mod:`zoo.recipes.warm_start`; "" for none.
        pictures_per_step: Pictures in a batch, or pairs of pictures for statements; each is encoded once.
        texts_per_picture: Texts about each.
        patch_steps: Steps at the start in which only patch labels are learned.
        patch_weight: Weight of patch labels afterwards.
        auxiliary_weight: Weight of the other auxiliary losses.
        fade_to: Fraction of both weights that is left at the end; they fall along a cosine.
        count_weight: Weight of reading counts off statements, within the auxiliary losses.
        place_weight: Weight of reading places off statements, within the auxiliary losses.
        kinds: Kinds of statement to train on; one that is listed twice is drawn twice as often. Empty for all kinds.
        data_seed: Edition of the data.
        first_pair: First pair of pictures that training takes.
        evaluation_pictures: Held-out pictures (or pairs) of each evaluation during training.
        test_items: Held-out samples that the model card reports on.

    Raises:
        ConfigError: A number is out of its range.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "pictures_per_step": whole(1, 10**6),
        "texts_per_picture": whole(1, 10**4),
        "patch_steps": whole(0),
        "patch_weight": WEIGHT,
        "auxiliary_weight": WEIGHT,
        "fade_to": SHARE,
        "count_weight": WEIGHT,
        "place_weight": WEIGHT,
        "data_seed": SEED,
        "first_pair": whole(0),
        "evaluation_pictures": whole(1, 10**6),
        "test_items": whole(1),
    }
    """What each number may be."""

    model: str = "blip_vqa_mini"
    start_from: str = "blip_nlvr_mini:dense"
    pictures_per_step: int = 48
    texts_per_picture: int = 4
    patch_steps: int = 0
    patch_weight: float = 1.0
    auxiliary_weight: float = 1.0
    fade_to: float = 0.1
    count_weight: float = StatementObjective.count_weight
    place_weight: float = StatementObjective.place_weight
    kinds: tuple[str, ...] = ()
    data_seed: int = 0
    first_pair: int = 2_000_000
    evaluation_pictures: int = 256
    test_items: int = 1024

    def __post_init__(self) -> None:
        check_numbers(self, self.RANGES, "settings")
        if self.start_from and not all(self.starting_weights):
            raise ConfigError(
                f'settings.start_from is {self.start_from!r}; it has to be "MODEL:CHECKPOINT", or "" for none'
            )

    @property
    def starting_weights(self) -> tuple[str, str]:
        """Model and checkpoint to start from."""
        name, _, checkpoint = self.start_from.partition(":")
        return name, checkpoint


@dataclass(kw_only=True)
class DenseLearner(Learner):
    """The learner of this recipe, with what its result is made of.

    Attributes:
        objective: What is learned.
        settings: Settings of the recipe.
    """

    objective: AnyDenseObjective
    settings: DenseSceneSettings


def build(settings: Mapping[str, object], training: TrainingConfig) -> DenseLearner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(DenseSceneSettings, settings, "settings")
    torch.manual_seed(training.seed)
    objective = _objective(chosen)

    def batch(step: int, rows: range) -> Batch:
        draw = objective.patch_batch if step < chosen.patch_steps else objective.batch
        return draw(chosen.data_seed, "train", chosen.first_pair, start=step * chosen.pictures_per_step, rows=rows)

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        if step < chosen.patch_steps:
            return objective.patch_losses(batch)
        progress = (step - chosen.patch_steps) / max(1, training.steps - chosen.patch_steps)
        return objective.dense_losses(batch, progress, chosen.patch_weight)

    held_out: list[Batch] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        if not held_out:
            held_out.extend(objective.held_out(chosen.data_seed, chosen.evaluation_pictures))
        return objective.scores([objective.module(**objective.inputs(batch)) for batch in held_out], held_out)

    return DenseLearner(
        module=objective.trained(),
        batch=batch,
        loss=loss,
        evaluate=evaluate,
        card={
            "model": chosen.model,
            "data": objective.data,
            "settings": asdict(chosen),
            "training": training.to_dict(),
        },
        depends_on={
            "settings": asdict(chosen),
            "weights": fingerprint_checkpoint(*chosen.starting_weights) if chosen.start_from else {},
        },
        samples_per_step=chosen.pictures_per_step,
        sample_name=objective.samples,
        padding=PADDING,
        objective=objective,
        settings=chosen,
    )


def _objective(settings: DenseSceneSettings) -> AnyDenseObjective:
    """Return what the settings let a new model learn."""
    objective = dense_scene_objective(zoo.create(settings.model), settings.texts_per_picture)
    objective.auxiliary_weight, objective.fade_to = settings.auxiliary_weight, settings.fade_to
    if isinstance(objective, StatementObjective):
        objective.kinds = settings.kinds
        objective.count_weight, objective.place_weight = settings.count_weight, settings.place_weight
    elif settings.kinds:
        raise ConfigError(f"settings.kinds are kinds of statement, and {settings.model} learns none; leave kinds out")
    if settings.start_from:
        start_from(objective.model, *settings.starting_weights)
    objective.add_patch_heads()
    return objective


def finish(learner: DenseLearner, result: TrainingResult, output: Path) -> None:
    """Write ``dense.safetensors`` and its model card ``dense.json`` into the output folder."""
    del result
    chosen, objective = learner.settings, learner.objective
    test = measure_task(chosen.model, objective.data, items=chosen.test_items, seed=chosen.data_seed)
    write_release(objective.model, output / "dense.safetensors", learner.card, test)
