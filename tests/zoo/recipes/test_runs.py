"""The recipes for statements about pairs, on runs of two or three steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shallow_models import shallow

import madtp
import zoo
from madtp.errors import ConfigError
from madtp.training import TrainingConfig, fit, train
from madtp.training.config import from_plain
from madtp.training.progress import Progress
from zoo.recipes import compress_scenes
from zoo.recipes.nlvr_scenes import build

SETTINGS: dict[str, Any] = {
    "pairs_per_step": 2,
    "statements_per_pair": 3,
    "patch_steps": 1,
    "evaluation_pairs": 2,
    "test_items": 6,
}


def test_a_run_leaves_weights_that_the_zoo_loads_and_a_card(tmp_path: Path) -> None:
    content = {
        "recipe": "zoo.recipes.nlvr_scenes",
        "training": {"steps": 3, "warmup_steps": 1, "optimiser": "muon", "checkpoint_every": 0},
        "settings": SETTINGS,
    }
    quiet = Progress(quiet=True)
    assert train(content, tmp_path, progress=quiet, stop_after=2).steps == 2
    assert not (tmp_path / "dense.safetensors").exists()
    train(content, tmp_path, progress=quiet, resume=True)
    model = zoo.create("blip_nlvr_mini", checkpoint=tmp_path / "dense.safetensors")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    card = json.loads((tmp_path / "dense.json").read_text())
    assert card["test"]["items"] == 6
    assert 0 <= card["test"]["metrics"]["accuracy"] <= 1
    assert card["training"]["steps"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_zoo")
def test_a_compression_leaves_a_taught_model_that_loads_and_a_card(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "recipe": "zoo.recipes.compress_scenes",
        "training": {"steps": 2, "warmup_steps": 1, "checkpoint_every": 0, "evaluate_every": 0},
        "settings": {
            "reduction": 0.3,
            "start_reduction": 0.25,
            "model": shallow("blip_nlvr"),
            "checkpoint": None,
            "pictures_per_step": 2,
            "texts_per_picture": 2,
            "teaching_samples": 2,
            "teaching_steps": 2,
            "calibration_items": 16,
            "test_items": 6,
            "pruning": {"alignment_tokens": 8},
        },
    }
    train(content, tmp_path, progress=Progress(quiet=True))
    madtp.load(tmp_path / "pruned")
    card = json.loads((tmp_path / "pruned" / "card.json").read_text())
    assert card["calibration"]["reduction"] == pytest.approx(0.3, abs=0.01)
    assert any("visual_encoder" in site for site in card["teaching"]["after"])


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_the_whole_in_compression(tmp_path: Path) -> None:
    """Texts of the parts differ in length, and in how many are spatial."""
    batch = {"pictures_per_step": 4, "texts_per_picture": 3}
    settings = {"model": "blip_nlvr_mini", **batch, "teaching_steps": 0, "start_reduction": 0.5}
    training = TrainingConfig(steps=9, learning_rate=1e-9, warmup_steps=0, precision="float32", evaluate_every=0)
    made = compress_scenes.build(settings, training)
    start, found = dict(made.state), []
    for accumulate in (1, 2):
        made.state.update(start)
        folder = tmp_path / str(accumulate)
        result = fit(
            made, replace(training, accumulate=accumulate), folder, progress=Progress(quiet=True), stop_after=1
        )
        found.append(({n: p.grad for n, p in made.module.named_parameters() if p.grad is not None}, result.metrics))
    (whole, metrics), (parts, other) = found
    lengths = {made.batch(0, rows)["input_ids"].shape[-1] for rows in (range(2), range(2, 4))}
    spatial = {float(made.batch(0, rows)["spatial"]) for rows in (range(2), range(2, 4))}
    assert len(spatial) == 2 or len(lengths) == 2
    assert set(whole) == set(parts)
    for name, gradient in whole.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            parts[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=lambda t, n=name: n + t
        )
    for name in set(metrics) - {"shape"}:
        assert other[name] == pytest.approx(metrics[name], rel=1e-4), name


def test_batches_follow_from_the_step() -> None:
    learner = build(SETTINGS, TrainingConfig())
    assert "labels" not in learner.batch(0, range(2))
    one, again, other = (learner.batch(step, range(2)) for step in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one if name != "places")
    assert torch.equal(one["places"].nan_to_num(), again["places"].nan_to_num())
    assert not torch.equal(one["images"], other["images"])


def test_what_the_recipe_cannot_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no setting pears_per_step"):
        build({"pears_per_step": 2}, TrainingConfig())
    with pytest.raises(ConfigError, match=r"settings\.model is 3; it takes a str"):
        build({"model": 3}, TrainingConfig())


def test_a_setting_that_may_be_left_empty_takes_none() -> None:
    assert from_plain(compress_scenes.CompressSceneSettings, {"checkpoint": None}, "settings").checkpoint is None
