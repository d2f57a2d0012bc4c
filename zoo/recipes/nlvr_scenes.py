"""The former name of :mod:`zoo.recipes.scenes_dense` for statements about pairs, with settings as older configs name them."""

from __future__ import annotations

from collections.abc import Mapping

from madtp.training.config import TrainingConfig
from zoo.recipes import scenes_dense
from zoo.recipes.scenes_dense import DenseLearner, finish

__all__ = ["build", "finish"]

_NEW_NAMES = {
    "pairs_per_step": "pictures_per_step",
    "statements_per_pair": "texts_per_picture",
    "evaluation_pairs": "evaluation_pictures",
}

_DEFAULTS: Mapping[str, object] = {
    "model": "blip_nlvr_mini",
    "start_from": "",
    "pictures_per_step": 32,
    "texts_per_picture": 16,
    "patch_steps": 500,
    "first_pair": 0,
    "evaluation_pictures": 128,
    "test_items": 8192,
}


def build(settings: Mapping[str, object], training: TrainingConfig) -> DenseLearner:
    """Return the learner of :func:`zoo.recipes.scenes_dense.build`."""
    renamed = {_NEW_NAMES.get(name, name): value for name, value in settings.items()}
    return scenes_dense.build({**_DEFAULTS, **renamed}, training)
