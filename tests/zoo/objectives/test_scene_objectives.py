"""Objectives on scenes: batches, losses, distances to the teacher, MACs, and the short cut of many statements about a pair."""

from __future__ import annotations

import pytest
import torch
from shallow_models import BUILDERS

import madtp
import zoo
from madtp.errors import ConfigError
from zoo.blip.nlvr import BlipNlvr
from zoo.objectives.multi_text import JointStatements
from zoo.objectives.scene_batches import draw_batch, make_batch
from zoo.objectives.scenes import AnySceneObjective, dense_scene_objective, scene_objective
from zoo.scenes import VOCABULARY
from zoo.scenes.single import ANSWERS

MODELS = ("blip_caption_mini", "blip_vqa_mini", "blip_retrieval_mini", "clip_mini")
TEXTS = {"blip_caption_mini": 2, "blip_vqa_mini": 3, "blip_nlvr_mini": 3}


def objective_of(name: str, texts: int) -> AnySceneObjective:
    return scene_objective(zoo.create(name), texts)


def shallow_objective_of(name: str, texts: int) -> AnySceneObjective:
    """That of a model with two blocks a tower, for tests that rewrite it."""
    return scene_objective(BUILDERS[name.removesuffix("_mini")](), texts)


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
    objective, dense = (shallow_objective_of(name, TEXTS.get(name, 1)) for _ in range(2))
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
    once = shallow_objective_of(name, 1)
    asked = once.inputs(once.batch(0, "train", 0, 0, range(4)))
    found = []
    for texts in (1, 3):
        torch.manual_seed(0)
        objective = shallow_objective_of(name, texts)
        inputs = {key: value if key == "images" else value.expand(-1, texts, -1) for key, value in asked.items()}
        pruned = madtp.rewrite(objective.module, inputs, config=madtp.PruningConfig(alignment_tokens=4, seed=0))
        pruned(**inputs)
        found.append(objective.macs(pruned))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_model_without_an_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="no objective for Linear"):
        scene_objective(torch.nn.Linear(1, 1), 1)


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


def test_reading_many_statements_at_once_equals_classifying_each() -> None:
    torch.manual_seed(0)
    model = zoo.create("blip_nlvr_mini")
    assert isinstance(model, BlipNlvr)
    batch = make_batch("val", 0, 0, pairs=2, statements=5)
    with torch.no_grad():
        together = JointStatements(model)(batch["images"], batch["input_ids"], batch["attention_mask"]).logits
        apart = model(
            batch["images"].repeat_interleave(5, 0),
            batch["input_ids"].flatten(0, 1),
            batch["attention_mask"].flatten(0, 1),
        )
    torch.testing.assert_close(together, apart)
