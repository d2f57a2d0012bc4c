"""The recipes on scenes: start weights, settings of configs and cards, and runs of two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shallow_models import shallow

import zoo
from madtp.errors import CheckpointError, ConfigError
from madtp.training import TrainingConfig, train
from madtp.training.config import from_plain
from madtp.training.progress import Progress
from madtp.training.run import read_config
from zoo.objectives.scene_statements import StatementObjective
from zoo.recipes import compress_scenes, nlvr_scenes, scenes_dense
from zoo.recipes.warm_start import start_from

RECIPES = Path(zoo.__file__).parent / "recipes"
WEIGHTS = RECIPES.parent / "weights"


def test_statements_are_trained_densely_by_the_recipe_of_all_tasks() -> None:
    settings = {"model": "blip_nlvr_mini", "start_from": "", "kinds": ["spatial"], "place_weight": 3.0}
    learner = scenes_dense.build({**settings, "pictures_per_step": 2, "texts_per_picture": 3}, TrainingConfig())
    objective = learner.objective
    assert isinstance(objective, StatementObjective)
    assert (objective.kinds, objective.count_weight, objective.place_weight) == (("spatial",), 1.0, 3.0)
    assert float(learner.batch(0, range(2))["spatial"]) > 0
    assert learner.batch(0, range(2))["input_ids"].shape[:2] == (2, 3)


def test_kinds_of_statement_are_refused_for_a_model_that_learns_none() -> None:
    with pytest.raises(ConfigError, match="blip_vqa_mini learns none; leave kinds out"):
        scenes_dense.build({"model": "blip_vqa_mini", "kinds": ["spatial"]}, TrainingConfig())
    for odd in ("dense", "blip_nlvr_mini:", ":dense"):
        with pytest.raises(ConfigError, match='has to be "MODEL:CHECKPOINT"'):
            scenes_dense.build({"model": "blip_vqa_mini", "start_from": odd}, TrainingConfig())


def test_the_former_names_of_settings_give_the_same_run() -> None:
    card = json.loads((WEIGHTS / "blip_nlvr_mini" / "dense.json").read_text())
    of_config = from_plain(
        scenes_dense.DenseSceneSettings, read_config(RECIPES / "blip_nlvr_mini.toml")["settings"], "settings"
    )
    assert nlvr_scenes.build(card["settings"], TrainingConfig()).settings == of_config


@pytest.mark.parametrize(("name", "share"), [("blip_retrieval_mini", 0.9), ("blip_vqa_mini", 0.9), ("clip_mini", 0.4)])
def test_a_model_starts_from_the_towers_of_another(name: str, share: float) -> None:
    torch.manual_seed(0)
    model: Any = zoo.create(name)
    copied = start_from(model, "blip_nlvr_mini", "dense")
    assert copied > share * len(model.state_dict())
    source: Any = zoo.create("blip_nlvr_mini", "dense")
    if name == "clip_mini":
        own, theirs = (
            model.visual.transformer.resblocks[2].attn.in_proj_weight,
            source.visual_encoder.blocks[2].attn.qkv.weight,
        )
    else:
        own = model.text_encoder.encoder.layer[1].crossattention.self.key.weight
        theirs = source.text_encoder.encoder.layer[1].crossattention.self0.key.weight
    assert torch.equal(own, theirs)


def test_a_model_with_nothing_in_common_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no weight in common"):
        start_from(torch.nn.Linear(2, 2), "blip_nlvr_mini", "dense")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*_mini*.toml")), ids=lambda path: path.stem)
def test_config_files_are_valid(path: Path) -> None:
    content = read_config(path)
    TrainingConfig.from_dict(content["training"])
    settings = {
        "zoo.recipes.scenes_dense": scenes_dense.DenseSceneSettings,
        "zoo.recipes.compress_scenes": compress_scenes.CompressSceneSettings,
    }
    if content["recipe"] in settings:
        chosen: Any = from_plain(settings[content["recipe"]], content["settings"], "settings")
        zoo.describe(chosen.model)


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*/*/card.json")), ids=lambda path: "/".join(path.parts[-3:-1]))
def test_settings_of_shipped_cards_can_be_used_again(path: Path) -> None:
    card = json.loads(path.read_text())
    chosen = from_plain(compress_scenes.CompressSceneSettings, card["settings"], "settings")
    assert chosen.model == path.parts[-3]
    assert card["calibration"]["reduction"] == pytest.approx(chosen.reduction, abs=0.01)
    assert TrainingConfig.from_dict(card["training"]).steps > 0


TRAINING: dict[str, Any] = {"steps": 2, "warmup_steps": 1, "optimiser": "muon", "checkpoint_every": 0, "threads": 1}
QUIET = Progress(quiet=True)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_zoo")
@pytest.mark.parametrize("name", [shallow("blip_caption"), shallow("blip_retrieval")])
def test_dense_training_then_compression(tmp_path: Path, name: str) -> None:
    dense = {"model": name, "pictures_per_step": 4, "texts_per_picture": 1, "patch_steps": 1, "test_items": 8}
    content: dict[str, Any] = {"recipe": "zoo.recipes.scenes_dense", "training": TRAINING}
    content["settings"] = {**dense, "evaluation_pictures": 64}
    train(content, tmp_path / "dense", progress=QUIET)
    card = json.loads((tmp_path / "dense" / "dense.json").read_text())
    assert card["test"]["items"] == 8
    assert {"cider", "mean_recall"} & set(card["test"]["metrics"])
    content = {"recipe": "zoo.recipes.compress_scenes", "training": TRAINING}
    content["settings"] = {
        "model": name,
        "checkpoint": str(tmp_path / "dense" / "dense.safetensors"),
        "reduction": 0.3,
        "start_reduction": 0.25,
        "pictures_per_step": 4,
        "texts_per_picture": 2,
        "teaching_samples": 4,
        "teaching_steps": 2,
        "calibration_items": 16,
        "test_items": 8,
        "distillation": 0.5,
        "pruning": {"alignment_tokens": 8},
    }
    result = train(content, tmp_path / "pruned", progress=QUIET)
    assert {"distil", "reduction"} <= set(result.metrics)
    assert ("align" in result.metrics) == (name != shallow("blip_caption"))
    card = json.loads((tmp_path / "pruned" / "pruned" / "card.json").read_text())
    assert card["calibration"]["reduction"] == pytest.approx(0.3, abs=0.02)
    assert card["teaching"]["steps"] == 2
