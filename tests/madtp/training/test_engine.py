"""Training: exact resume, checkpoints, schedule, config and errors, on a model of a few numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from small_learner import QUIET, learner, tiny
from torch import Tensor, nn

from madtp.errors import CheckpointError, ConfigError, TrainingError, UnwritableError
from madtp.training import TrainingConfig, fit
from madtp.training.checkpoint import checkpoints
from madtp.training.optim import learning_rate_at, make_optimisers
from madtp.training.precision import precision_on
from madtp.training.prefetch import prefetch
from madtp.training.run import read_config, train


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop", [1, 7])
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, optimiser: str, precision: str, stop: int
) -> None:
    config = tiny(optimiser=optimiser, precision=precision)
    whole, parts = learner(), learner()
    fit(whole, config, tmp_path / "whole", progress=QUIET)
    fit(parts, config, tmp_path / "parts", progress=QUIET, stop_after=stop)
    again = learner()
    for parameter in again.module.parameters():
        nn.init.zeros_(parameter)
    result = fit(again, config, tmp_path / "parts", progress=QUIET, resume=True)
    assert result.steps == 12
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name


def test_state_of_the_learner_travels_with_checkpoints(tmp_path: Path) -> None:
    steered = learner()

    def on_step(done: int, module: nn.Module, metrics: Mapping[str, float | Tensor]) -> None:
        steered.state["gain"] = steered.state.get("gain", 0.0) + 0.5

    steered.on_step = on_step
    fit(steered, tiny(), tmp_path, progress=QUIET, stop_after=5)
    fresh = learner()
    fit(fresh, tiny(), tmp_path, progress=QUIET, resume=True, stop_after=5)
    assert fresh.state == {"gain": 2.5}


def test_training_lowers_the_loss_and_keeps_frozen_parameters(tmp_path: Path) -> None:
    taught = learner()
    frozen = taught.module[3].bias.clone()  # type: ignore[index]
    result = fit(taught, tiny(steps=80), tmp_path, progress=QUIET)
    assert result.metrics["task"] < 0.5
    assert torch.equal(taught.module[3].bias, frozen)  # type: ignore[index]


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 9 is nan.*step-00000008"):
        fit(learner(nan_at=9), tiny(), tmp_path / "late", progress=QUIET)
    with pytest.raises(TrainingError, match="no checkpoint yet"):
        fit(learner(nan_at=1), tiny(), tmp_path / "soon", progress=QUIET)


def test_a_full_disk_leaves_the_last_checkpoint_to_resume_from(tmp_path: Path) -> None:
    fit(learner(), tiny(), tmp_path / "full", progress=QUIET, stop_after=4)
    with full_disk(), pytest.raises(UnwritableError, match=r"step-00000008 cannot be written .*; free space there"):
        fit(learner(), tiny(), tmp_path / "full", progress=QUIET, resume=True)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-00000004"]
    again, whole = learner(), learner()
    fit(again, tiny(), tmp_path / "full", progress=QUIET, resume=True)
    fit(whole, tiny(), tmp_path / "whole", progress=QUIET)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value), name


def test_an_old_checkpoint_is_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed as it removes one leaves no part of it under a checkpoint's name."""

    def killed(path: Path) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(learner(), tiny(checkpoint_every=1, keep_checkpoints=1), tmp_path, progress=QUIET)
    for found in (tmp_path / "checkpoints").glob("step-*"):
        assert (found / "state.json").exists()
    fit(learner(), tiny(checkpoint_every=1, keep_checkpoints=1), tmp_path, progress=QUIET, resume=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_told_before_anything_is_written(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'"):
        fit(learner(), tiny(), tmp_path, progress=QUIET, device=device)
    assert not list(tmp_path.iterdir())


def test_a_second_run_does_not_overwrite_the_first_unasked(tmp_path: Path) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=4)
    with pytest.raises(TrainingError, match="resume it or choose another folder"):
        fit(learner(), tiny(), tmp_path, progress=QUIET)


def test_only_the_last_checkpoints_are_kept_and_none_is_pickled(tmp_path: Path) -> None:
    fit(learner(), tiny(keep_checkpoints=2), tmp_path, progress=QUIET)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000008", "step-00000012"]
    files = {path.name for path in (tmp_path / "checkpoints" / folders[-1]).iterdir()}
    assert files == {"tensors.safetensors", "state.json", "hashes.json"}


def damage_tensors(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def damage_state(path: Path) -> None:
    (path / "state.json").write_text("{")


def make_newer(path: Path) -> None:
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**content, "version": 99}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_tensors, "is damaged"),
        (damage_state, "is damaged"),
        (make_newer, "version 99"),
    ],
)
def test_a_bad_checkpoint_is_refused(tmp_path: Path, harm: Any, message: str) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=4)
    (path,) = checkpoints(tmp_path / "checkpoints")
    harm(path)
    with pytest.raises(CheckpointError, match=message):
        fit(learner(), tiny(), tmp_path, progress=QUIET, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=4)
    other = learner()
    other.module = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises(CheckpointError, match="another model"):
        fit(other, tiny(), tmp_path, progress=QUIET, resume=True)


@given(st.integers(1, 200), st.integers(0, 50), st.floats(1e-6, 1.0), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_learning_rate_rises_then_falls_between_its_bounds(
    steps: int, warmup: int, peak: float, final: float
) -> None:
    config = tiny(steps=steps, warmup_steps=warmup, learning_rate=peak, final_learning_rate=final * peak)
    rates = [learning_rate_at(step, config) for step in range(steps)]
    assert all(0 < rate <= peak * (1 + 1e-9) or step >= warmup for step, rate in enumerate(rates))
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_every_trained_parameter_is_in_one_optimiser_once() -> None:
    module = learner().module
    module.append(module[3])  # type: ignore[operator]
    optimisers = make_optimisers(module, tiny(optimiser="muon"))
    held = [id(p) for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    with pytest.raises(TrainingError, match="requires a gradient"):
        make_optimisers(nn.Linear(2, 2).requires_grad_(False), tiny())


def test_prefetch_keeps_order_and_hands_on_errors() -> None:
    assert list(prefetch(lambda step: step * step, 2, 9, depth=2)) == [step * step for step in range(2, 9)]

    def fail(step: int) -> int:
        if step == 3:
            raise ValueError("three")
        return step

    batches = prefetch(fail, 0, 9)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(batches)
    for value in prefetch(lambda step: step, 0, 10**9):
        if value == 5:
            break


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"stepps": 3}, "no setting stepps"),
        ({"precision": "float16"}, "bfloat16"),
        ({"optimiser": "sgd"}, "adamw, muon"),
        ({"final_learning_rate": 1.0}, "between 0"),
        ({"warmup_steps": -1}, r"training\.warmup_steps is -1; it has to be a whole number of at least 0"),
        ({"steps": "many"}, "takes a int"),
        ({"betas": [0.9]}, "two numbers"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_dict(values)


@pytest.mark.parametrize("has", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_auto_is_the_faster_precision_of_the_processor(monkeypatch: pytest.MonkeyPatch, has: str | None) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has, raising=False)
    processor = torch.device("cpu")
    assert precision_on(processor, "auto") == ("float32" if has is None else "bfloat16")
    assert precision_on(processor, "bfloat16") == "bfloat16"


def test_config_round_trip() -> None:
    config = tiny(betas=[0.8, 0.9])
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('recipe = "zoo.recipes.nlvr_scenes"\n[training]\nsteps = 3\n')
    assert read_config(path)["training"] == {"steps": 3}
    for text, message in [("a = ", "not valid TOML"), ("[training]", "names no recipe"), ("x = 1", "holds x")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "missing.toml")
    for text in ("[1]", "3", "null", '"a"'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ConfigError, match="has to name a recipe and hold tables"):
            read_config(tmp_path / "c.json")
    for table in ("training", "settings"):
        for value in (3, [1], None, "ab"):
            with pytest.raises(ConfigError, match=f"'{table}' is .*; it has to be a table of settings"):
                read_config({"recipe": "zoo.recipes.nlvr_scenes", table: value})
    for name in ("", ".", ".nlvr_scenes", "zoo..recipes", "zoo.recipes.", "a b", "a\0b", "../x", "\ud800"):
        with pytest.raises(ConfigError, match="which is no name of a module"):
            train({"recipe": name}, tmp_path)
    with pytest.raises(ConfigError, match="no recipe module"):
        train({"recipe": "zoo.recipes.unheard_of"}, tmp_path)
    with pytest.raises(ConfigError, match="is not a recipe"):
        train({"recipe": "json"}, tmp_path)
