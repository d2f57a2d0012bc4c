"""The recipes on scenes for captions, questions and retrieval: objectives, start weights, and runs of two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import madtp
import zoo
from madtp.errors import CheckpointError, ConfigError
from madtp.training import TrainingConfig, train
from madtp.training.config import from_plain
from madtp.training.progress import Progress
from madtp.training.run import read_config
from zoo.objectives.scene_batches import draw_batch
from zoo.objectives.scene_statements import StatementObjective
from zoo.objectives.scenes import AnySceneObjective, dense_scene_objective, scene_objective
from zoo.recipes import compress_scenes, nlvr_scenes, scenes_dense
from zoo.recipes.warm_start import start_from
from zoo.scenes import VOCABULARY
from zoo.scenes.single import ANSWERS

RECIPES = Path(zoo.__file__).parent / "recipes"
WEIGHTS = RECIPES.parent / "weights"
MODELS = ("blip_caption_mini", "blip_vqa_mini", "blip_retrieval_mini", "clip_mini")
TEXTS = {"blip_caption_mini": 2, "blip_vqa_mini": 3, "blip_nlvr_mini": 3}


def objective_of(name: str, texts: int) -> AnySceneObjective:
    return scene_objective(zoo.create(name), texts)


def words(ids: torch.Tensor) -> str:
    return " ".join(VOCABULARY[i] for i in ids.tolist() if i < len(VOCABULARY) and not VOCABULARY[i].startswith("["))


def test_pictures_are_the_same_whichever_rows_are_asked_for() -> None:
    listed, whole = draw_batch(0, "train", 6, 5)
    later, part = draw_batch(0, "train", 9, 2)
    assert [(p.index, p.side) for p in listed] == [(3, 0), (3, 1), (4, 0), (4, 1), (5, 0)]
    assert [(p.index, p.side) for p in later] == [(4, 1), (5, 0)]
    assert all(torch.equal(whole[name][3:5], part[name]) for name in whole)
    assert whole["things"].sum(1).tolist() == [len(picture.things) for picture in listed]


@pytest.mark.parametrize("name", ["blip_nlvr_mini", *MODELS])
def test_an_objective_follows_from_its_place(name: str) -> None:
    objective = objective_of(name, TEXTS.get(name, 1))
    whole = objective.batch(0, "train", 100, 8, range(6))
    part = objective.batch(0, "train", 100, 8, range(2, 4))
    ids = whole["input_ids"][2:4]
    assert torch.equal(ids[..., : part["input_ids"].shape[-1]], part["input_ids"])
    output = objective.module(**objective.inputs(whole))
    loss, metrics = objective.losses(objective.module, whole, output, 0.5)
    loss.backward()
    assert torch.isfinite(loss)
    assert 0 <= float(metrics["accuracy"]) <= 1
    silent = {key for key, value in objective.model.named_parameters() if value.grad is None}
    assert not silent
    assert all(0 <= score <= 1 for score in objective.scores([output], [whole]).values())


def test_questions_come_with_their_answers() -> None:
    batch = objective_of("blip_vqa_mini", 3).batch(0, "val", 0, 0, range(4))
    assert batch["input_ids"].shape[:2] == batch["answer_ids"].shape[:2] == (4, 3)
    assert {words(ids) for ids in batch["answer_ids"].flatten(0, 1)} <= set(ANSWERS)
    assert float(batch["words"]) == 4 * 3 * 2


def test_captions_of_a_picture_differ() -> None:
    batch = objective_of("blip_caption_mini", 2).batch(0, "val", 0, 0, range(4))
    for first, second in batch["input_ids"]:
        assert words(first) != words(second)
        assert sorted(words(first).split()[4:]) == sorted(words(second).split()[4:])


@pytest.mark.parametrize("name", ["blip_retrieval_mini", "clip_mini"])
def test_pairs_follow_the_features_of_the_dense_model(name: str) -> None:
    objective = objective_of(name, 1)
    batch = objective.batch(0, "train", 0, 0, range(4))
    output = objective.module(**objective.inputs(batch))
    assert float(objective.distance(output, output).detach()) == pytest.approx(0.0, abs=1e-4)
    turned = output._replace(image_features=-output.image_features)
    distance = objective.distance(output, turned)
    assert float(distance.detach()) == pytest.approx(20.0, abs=1e-3)
    distance.backward()
    assert all(
        float(value.grad.norm()) > 0 for key, value in objective.model.named_parameters() if "proj.weight" in key
    )


@pytest.mark.parametrize("name", sorted({*MODELS} - {"clip_mini"}))
def test_survivors_follow_the_image_tokens_of_the_dense_model(name: str) -> None:
    objective, dense = (objective_of(name, TEXTS.get(name, 1)) for _ in range(2))
    dense.model.load_state_dict(objective.model.state_dict())
    batch = objective.batch(0, "train", 0, 0, range(4))
    torch.manual_seed(0)
    alike = objective.distillation(objective.module, dense.module, batch, objective.module(**objective.inputs(batch)))
    assert float(alike.detach()) == pytest.approx(0.0, abs=1e-3)
    pruned = madtp.rewrite(
        objective.module, objective.inputs(batch), config=madtp.PruningConfig(alignment_tokens=4, gain=2.0)
    )
    output = pruned(**objective.inputs(batch))
    left = pruned.surviving("visual_encoder" if name == "blip_retrieval_mini" else "model.visual_encoder")
    assert left is not None
    apart = {}
    for part, mask in (("survivors", left), ("dropped", ~left)):
        torch.manual_seed(0)
        tokens = torch.where(mask[..., None], -output.image_tokens, output.image_tokens)
        apart[part] = float(
            objective.distillation(pruned, dense.module, batch, output._replace(image_tokens=tokens)).detach()
        )
    torch.manual_seed(0)
    as_it_is = float(objective.distillation(pruned, dense.module, batch, output).detach())
    assert apart["dropped"] == pytest.approx(as_it_is, abs=1e-3)
    assert abs(apart["survivors"] - as_it_is) > 1


@pytest.mark.parametrize("name", ["blip_caption_mini", "blip_nlvr_mini"])
def test_macs_are_those_of_one_text_however_many_are_asked(name: str) -> None:
    once = objective_of(name, 1)
    asked = once.inputs(once.batch(0, "train", 0, 0, range(4)))
    found = []
    for texts in (1, 3):
        torch.manual_seed(0)
        objective = objective_of(name, texts)
        inputs = {key: value if key == "images" else value.expand(-1, texts, -1) for key, value in asked.items()}
        pruned = madtp.rewrite(objective.module, inputs, config=madtp.PruningConfig(alignment_tokens=4, seed=0))
        pruned(**inputs)
        found.append(objective.macs(pruned))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_model_without_an_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="no objective for Linear"):
        scene_objective(torch.nn.Linear(1, 1), 1)


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


def test_the_former_names_of_settings_give_the_same_run() -> None:
    card = json.loads((WEIGHTS / "blip_nlvr_mini" / "dense.json").read_text())
    of_config = from_plain(
        scenes_dense.DenseSceneSettings, read_config(RECIPES / "blip_nlvr_mini.toml")["settings"], "settings"
    )
    assert nlvr_scenes.build(card["settings"], TrainingConfig()).settings == of_config


@pytest.mark.parametrize("name", ["blip_nlvr_mini", *MODELS])
def test_dense_training_learns_the_same_as_compression(name: str) -> None:
    """The task's loss is that of the objective of compression, whatever short cuts dense training takes."""
    model = zoo.create(name)
    losses = []
    for objective in (scene_objective(model, TEXTS.get(name, 1)), dense_scene_objective(model, TEXTS.get(name, 1))):
        batch = objective.batch(0, "train", 0, 0, range(4))
        torch.manual_seed(0)
        _, metrics = objective.losses(objective.module, batch, objective.module(**objective.inputs(batch)), 0.5)
        losses.append(float(metrics["task" if "task" in metrics else "contrast"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


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
@pytest.mark.parametrize("name", ["blip_caption_mini", "blip_retrieval_mini"])
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
    assert ("align" in result.metrics) == (name != "blip_caption_mini")
    madtp.load(tmp_path / "pruned" / "pruned", zoo.create(name))
    card = json.loads((tmp_path / "pruned" / "pruned" / "card.json").read_text())
    assert card["calibration"]["reduction"] == pytest.approx(0.3, abs=0.02)
    assert card["teaching"]["steps"] == 2
