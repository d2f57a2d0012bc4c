"""Controls: merging of tokens by hand-made examples, and each control of `benchmarks/controls.py` on a run of a step."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from project_paths import ROOT
from shallow_models import shallow
from small_blip import inputs, small

import madtp
import zoo
from madtp.errors import ConfigError
from madtp.training import TrainingConfig
from madtp.training.progress import Progress
from zoo.recipes import controls
from zoo.recipes import model_card as cards
from zoo.recipes.token_merging import merge, merge_tokens


def test_the_most_similar_tokens_merge_into_the_mean_of_their_parts() -> None:
    x = torch.tensor([[[9.0], [1.0], [3.0], [5.0], [7.0]]])
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]])
    parts = torch.tensor([[1.0, 1.0, 3.0, 1.0, 1.0]])
    merged, counts = merge(x, parts, keys, 1)
    # Of the places 2 and 4 (the class token stays), 2 is like 1, and has three parts.
    assert merged[0, :, 0].tolist() == [9.0, 7.0, 2.5, 5.0]
    assert counts[0].tolist() == [1.0, 1.0, 4.0, 1.0]


def test_the_class_token_stays_and_at_most_every_other_token_goes() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3)
    merged, counts = merge(x, torch.ones(2, 8), torch.randn(2, 8, 4), 99)
    assert torch.equal(merged[:, 0], x[:, 0])
    assert merged.shape == (2, 5, 3)
    assert counts.sum(1).tolist() == [8.0, 8.0]
    torch.testing.assert_close((merged * counts[..., None]).sum(1), x.sum(1))
    assert merge(x[:, :1], torch.ones(2, 1), x[:, :1], 3)[0].shape == (2, 1, 3)


def test_a_tower_that_merges_nothing_is_the_tower() -> None:
    model, given = small("retrieval"), inputs("retrieval")
    with torch.no_grad():
        expected = model(**given)
        merge_tokens(model, 0)
        found = model(**given)
        torch.testing.assert_close(found.match_logits, expected.match_logits)
        whole = madtp.count_macs(model, given)
        merge_tokens(model, 3)
        assert model(**given).image_tokens.shape[1] == 17 - 2 * 3
    assert madtp.count_macs(model, given) < whole


def test_a_tower_of_clip_that_merges_nothing_is_the_tower() -> None:
    torch.manual_seed(0)
    model: Any = zoo.create("clip_mini")
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model.visual(images)
        merge_tokens(model, 0)
        torch.testing.assert_close(model.visual(images), expected)
        merge_tokens(model, 3)
        assert model.visual.transformer(torch.randn(2, 145, 128)).shape[1] == 145 - 6 * 3
        assert not torch.equal(model.visual(images), expected)


def test_a_model_without_such_a_tower_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no vision tower of timm's or CLIP's blocks"):
        merge_tokens(torch.nn.Linear(1, 1), 3)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "benchmarks" / "controls.py"
    spec = importlib.util.spec_from_file_location("benchmark_controls", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_task_has_a_recipe(script: ModuleType) -> None:
    for model in script.TASKS.values():
        assert (Path(zoo.__file__).parent / "recipes" / f"{model}_compress.toml").is_file()


def test_cards_become_a_table(script: ModuleType, tmp_path: Path) -> None:
    for name, test in (
        ("madtp-0", {"metrics": {"vqa_accuracy": 0.9}}),
        ("smaller-input-1", {"accuracy": {"all": 0.5}}),
    ):
        folder = tmp_path / "questions" / "80" / name / "pruned"
        folder.mkdir(parents=True)
        card = {"calibration": {"reduction": 0.8}, "training": {"steps": 3}, "test": test}
        (folder / "card.json").write_text(json.dumps(card))
    rows = script.table(tmp_path).splitlines()[2:]
    assert rows == [
        "| questions | madtp | 80.0% | vqa_accuracy | 0.9000 | 3 | 0 |",
        "| questions | smaller-input | 80.0% | accuracy | 0.5000 | 3 | 1 |",
    ]


def test_recalls_at_one_are_shown_as_their_mean(script: ModuleType) -> None:
    assert script.main_metric({"metrics": {"text_r1": 0.5, "image_r1": 0.75, "mean_recall": 1.0}}) == (
        "recall@1",
        0.625,
    )


@pytest.mark.parametrize(("slope", "expected"), [(10.0, 7), (-10.0, 3)])
def test_the_nearest_size_is_found_whether_macs_rise_or_fall(slope: float, expected: int) -> None:
    tried: list[int] = []

    def macs(size: int) -> float:
        tried.append(size)
        return 50 + slope * (size - 5) + 1e-3

    assert controls._nearest(range(1, 72), macs, 71.0) == expected
    assert len(tried) < 12


SETTINGS: dict[str, dict[str, Any]] = {
    "blip_vqa_mini": {
        "model": "blip_vqa_mini",
        "reduction": 0.5,
        "pictures_per_step": 4,
        "texts_per_picture": 1,
        "teaching_samples": 4,
        "teaching_steps": 1,
        "calibration_items": 16,
        "test_items": 4,
        "pruning": {"alignment_tokens": 8},
    },
    "clip_mini": {
        "model": "clip_mini",
        "reduction": 0.5,
        "distillation": 1.0,
        "pictures_per_step": 4,
        "texts_per_picture": 1,
        "calibration_items": 16,
        "test_items": 4,
    },
    "blip_nlvr_mini": {
        "model": "blip_nlvr_mini",
        "reduction": 0.5,
        "pictures_per_step": 2,
        "texts_per_picture": 2,
        "test_items": 4,
    },
}
DATA = {"blip_vqa_mini": "scenes_questions", "clip_mini": "scenes_captions", "blip_nlvr_mini": "scenes"}
TRAINING = TrainingConfig(steps=1, warmup_steps=0, threads=1, checkpoint_every=0, evaluate_every=0)


def card(output: Path) -> dict[str, Any]:
    return json.loads((output / "pruned" / "card.json").read_text())


def retested(model: torch.nn.Module, name: str, data: str) -> dict[str, Any]:
    """What a model scores in the test of the cards."""
    return cards.test_task(model, name, data, items=4, seed=0)


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_dense_controls_take_the_size_whose_macs_are_nearest(tmp_path: Path, name: str) -> None:
    quiet = Progress(quiet=True)
    controls.fine_tune_smaller(SETTINGS[name], TRAINING, tmp_path / "smaller", quiet)
    found = card(tmp_path / "smaller")
    assert found["image_size"] in (64, 72)
    assert found["calibration"]["reduction"] == pytest.approx(0.5, abs=0.1)
    assert found["test"]["metrics"]
    controls.fine_tune_merging(SETTINGS[name], TRAINING, tmp_path / "merging", quiet)
    assert card(tmp_path / "merging")["calibration"]["reduction"] == pytest.approx(0.5, abs=0.05)
    for kind in ("smaller", "merging"):
        again = controls.reopen(tmp_path / kind / "pruned")
        assert retested(again, name, DATA[name]) == card(tmp_path / kind)["test"]


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_zoo")
def test_without_training_and_with_fixed_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = shallow("blip_vqa")
    settings = {**SETTINGS["blip_vqa_mini"], "model": name, "checkpoint": None}
    controls.training_free(settings, TRAINING, tmp_path / "free")
    assert "capturing ManyQuestions" not in caplog.text, "alignment tokens are taught by the program of the rewrite"
    found = card(tmp_path / "free")
    assert found["training"]["steps"] == 0
    assert found["calibration"]["reduction"] == pytest.approx(0.5, abs=0.02)
    assert retested(controls.reopen(tmp_path / "free" / "pruned"), name, "scenes_questions") == found["test"]
    controls.frozen(settings, tmp_path / "free" / "pruned", tmp_path / "static")
    assert card(tmp_path / "static")["calibration"]["reduction"] == pytest.approx(0.5, abs=0.06)
