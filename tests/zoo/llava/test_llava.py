"""``llava_mini``: its tower is that of CLIP, and it learns, answers and is pruned in conversations about scenes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import madtp
import zoo
from madtp.errors import ConfigError
from madtp.evaluation import evaluate
from madtp.tuning.search import dense_macs
from zoo.llava.conversation import ANSWER, END, IMAGE, Turn, conversation, prompts, spoken
from zoo.objectives.scene_conversations import ConversationObjective
from zoo.objectives.scenes import dense_scene_objective
from zoo.recipes.model_card import test_task as scores_of
from zoo.recipes.warm_start import start_from
from zoo.scenes.single import ANSWERS
from zoo.scenes.tokens import VOCABULARY
from zoo.tasks.conversing import Conversing
from zoo.transforms import for_model

ONE_SITE = madtp.PruningConfig(
    selection="diversity", keep_ratio=0.25, layers={"*language_model*": (0,), "*": ()}, alignment=False
)
TURNS = [Turn("how many circles are there", "two"), Turn("what colour is the cross", "red")]


def test_a_conversation_is_read_back() -> None:
    ids, written = conversation(TURNS, 3)
    assert ids[:4].tolist() == [1, IMAGE, IMAGE, IMAGE]
    assert [VOCABULARY[i] for i in ids[written].tolist() if i != END] == ["two", "red"]
    assert int((ids == ANSWER).sum()) == int((ids == END).sum()) == 2
    assert spoken(ids[written].tolist()) == "two"
    assert spoken([VOCABULARY.index("two"), VOCABULARY.index("red")]) == "two red"
    assert spoken([]) == ""


def test_prompts_end_where_the_answer_begins() -> None:
    ids, mask = prompts([[Turn("how many circles are there")], [*TURNS[:1], Turn("is there a red cross")]], 3)
    assert (ids[:, -1] == ANSWER).all()
    assert mask.sum(1).tolist() == [1 + 3 + 6, 1 + 3 + 8 + 6]
    assert not mask[0, 0]


def test_without_transformers_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'madtp\[hf\]'"):
        zoo.create("llava_mini")


@pytest.fixture(scope="module")
def objective() -> ConversationObjective:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = dense_scene_objective(zoo.create("llava_mini"), 4)
    assert isinstance(made, ConversationObjective)
    return made


@torch.no_grad()
def test_the_tower_starts_from_that_of_clip(objective: ConversationObjective) -> None:
    model: Any = objective.model
    source: Any = zoo.create("clip_mini", "dense")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    start_from(model, "clip_mini", "dense")
    seen: list[Tensor] = []
    handle = source.visual.transformer.register_forward_hook(lambda module, given, output: seen.append(output))
    images = torch.randn(2, 3, 96, 96)
    source(images)
    handle.remove()
    torch.testing.assert_close(model.model.vision_tower(images).last_hidden_state, seen[0], atol=1e-4, rtol=1e-4)
    model.load_state_dict(before)


def test_questions_come_before_the_caption_and_differ(objective: ConversationObjective) -> None:
    batch = objective.batch(0, "train", 100, 8, range(6))
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        said = " ".join(
            VOCABULARY[i] if i < len(VOCABULARY) else {ANSWER: "|", END: "."}.get(i, "")
            for i in ids[mask.bool()].tolist()
        )
        turns = [turn.partition(" | ") for turn in said.split("[ENC]")[1].strip(" .").split(" . ")]
        questions = [question.strip() for question, _, _ in turns]
        assert len(questions) == len({*questions}) > 1
        assert questions[-1].startswith("from ")
        assert all(answer.strip() in ANSWERS for _, _, answer in turns[:-1])


def test_a_single_question_comes_without_a_caption() -> None:
    pytest.importorskip("transformers")
    single = ConversationObjective(zoo.create("llava_mini"), 1)
    batch = single.batch(0, "train", 0, 0, range(4))
    assert ((batch["input_ids"] == ANSWER) & (batch["attention_mask"] == 1)).sum(1).tolist() == [1] * 4
    _, metrics = single.losses(single.module, batch, single.module(**single.inputs(batch)), 0.0)
    assert 4 * float(metrics["accuracy"]) in range(5)


def test_a_batch_follows_from_its_place_and_gives_gradients(objective: ConversationObjective) -> None:
    whole = objective.batch(0, "train", 100, 8, range(6))
    part = objective.batch(0, "train", 100, 8, range(2, 4))
    assert torch.equal(whole["input_ids"][2:4, : part["input_ids"].shape[1]], part["input_ids"])
    output = objective.module(**objective.inputs(whole))
    loss, metrics = objective.losses(objective.module, whole, output, 0.5)
    loss.backward()
    # The class token and the last norm of the tower are not read by a decoder that takes patches.
    silent = {key for key, value in objective.model.named_parameters() if value.grad is None}
    assert all("post_layernorm" in key for key in silent)
    assert torch.isfinite(loss)
    assert 0 <= float(metrics["accuracy"]) <= 1
    objective.model.zero_grad()


def test_patch_heads_read_the_tower(objective: ConversationObjective) -> None:
    objective.add_patch_heads()
    batch = objective.batch(0, "train", 0, 0, range(2))
    loss, metrics = objective.dense_losses(batch, 0.0, 1.0)
    patches, _ = objective.patch_losses(objective.patch_batch(0, "train", 0, 0, range(2)))
    assert float(metrics["patch"]) == pytest.approx(float(patches), rel=1e-4)
    assert float(loss) == pytest.approx(float(metrics["task"] + metrics["patch"]), rel=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_macs_are_those_of_a_prompt_however_long_the_conversation(objective: ConversationObjective) -> None:
    config = ONE_SITE
    batch = objective.batch(0, "train", 0, 0, range(2))
    pruned = madtp.rewrite(objective.model.eval(), objective.inputs(batch), config=config)
    objective.attach(pruned)
    ids, mask = prompts([[Turn("how many small red shapes are there")]] * 2, 144)
    pruned.madtp.config = dataclasses.replace(config, keep_ratio=0.125)
    pruned(pixel_values=batch["images"], input_ids=ids, attention_mask=mask)
    wanted = pruned.madtp.macs(), dense_macs(pruned)
    pruned(**objective.inputs(batch))
    assert dense_macs(pruned) > 1.15 * wanted[1]
    assert objective.macs(pruned) == pytest.approx(wanted, rel=0.03)
    loss = objective.distance_to_teacher(
        pruned,
        objective.model,
        batch,
        output=pruned(**objective.inputs(batch)),
        target=objective.model(**objective.inputs(batch)),
    )
    assert float(loss) > 0
    assert torch.isfinite(objective.certainty(pruned(**objective.inputs(batch))))


@torch.no_grad()
def test_the_shipped_model_answers_questions_it_has_not_seen() -> None:
    pytest.importorskip("transformers")
    result = scores_of(zoo.create("llava_mini", "dense"), "llava_mini", "scenes_questions", items=48, seed=0)
    assert cast(dict[str, float], result["metrics"])["vqa_accuracy"] > 0.9


@pytest.mark.slow
@torch.no_grad()
def test_steps_of_an_answer_are_no_further_prompts() -> None:
    pytest.importorskip("transformers")
    task = Conversing(
        zoo.data("scenes_questions", split="test", limit=8, transform=for_model("llava_mini")),
        torch.device("cpu"),
        zoo.create("llava_mini"),
    )
    pruned = madtp.rewrite(zoo.create("llava_mini", "dense"), task.inputs(range(4)))
    found = evaluate(pruned, task, batch_size=4)
    pruned(**task.inputs(range(4)))
    assert found.dense_macs == pytest.approx(dense_macs(pruned), rel=0.05)
