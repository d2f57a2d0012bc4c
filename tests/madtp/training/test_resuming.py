"""Resuming: poisoned steps, damaged checkpoints, other configs, and two runs at once."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import environment, kill
from safetensors.torch import load_file, save_file
from small_learner import QUIET, learner, tiny
from torch import Tensor, nn

from madtp.errors import CheckpointError, DataError, OutputInUseError, TrainingError
from madtp.saving.model_folder import sha256_of
from madtp.training import Learner, TrainingConfig, fit, train
from madtp.training.checkpoint import checkpoints

EVERY_STEP = {"checkpoint_every": 1, "evaluate_every": 0}


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the newest checkpoint."""
    tensors = load_file(checkpoints(folder / "checkpoints")[-1] / "tensors.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("module.")}


def poisoned(at: int, how: str) -> Learner:
    """A learner whose loss is finite, but one step of which goes wrong after it."""
    made = learner()
    own = made.loss

    def loss(module: nn.Module, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, Mapping[str, Any]]:
        value, metrics = own(module, batch, step)
        if step == at:
            weight = next(module.parameters())
            nothing = weight - weight.detach()
            if how == "nan gradients":
                value = value + (0 * weight.sum()).sqrt()
            elif how == "infinite gradients":
                value = value + nothing.sum().sqrt()
            elif how == "huge gradients":  # finite, but not their norm
                value = value + nothing.sum() * 3e38
        return value, metrics

    made.loss = loss

    def spoil(done: int, module: nn.Module, metrics: Mapping[str, Any]) -> None:
        if done == at + 1:
            nn.init.constant_(next(module.parameters()), float("inf"))

    if how == "weights":
        made.on_step = spoil
    return made


@pytest.mark.parametrize("how", ["nan gradients", "infinite gradients", "huge gradients"])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_gradients_that_are_not_finite_never_reach_the_weights(
    tmp_path: Path, how: str, optimiser: str, clip_norm: float
) -> None:
    config = tiny(optimiser=optimiser, clip_norm=clip_norm, **EVERY_STEP)
    made = poisoned(5, how)
    with pytest.raises(TrainingError, match=r"step 5 is [\d.]+ and the norm of its gradients .*step-00000005"):
        fit(made, config, tmp_path, progress=QUIET)
    assert all(value.isfinite().all() for value in made.module.state_dict().values())
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    fit(learner(), config, tmp_path, progress=QUIET, resume=True)  # without the poison, from where it says


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    config = tiny(keep_checkpoints=1, **EVERY_STEP)
    with pytest.raises(
        TrainingError, match=r"after step 6, 1 tensors hold NaN .*module\.0\.weight.*step-00000006 by --res"
    ):
        fit(poisoned(6, "weights"), config, tmp_path, progress=QUIET)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000006"]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_infinities_that_a_module_has_from_the_start_are_its_own_affair(tmp_path: Path) -> None:
    made, again = learner(), learner()
    for one in (made, again):
        one.module.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    fit(made, tiny(), tmp_path, progress=QUIET, stop_after=5)
    assert fit(again, tiny(), tmp_path, progress=QUIET, resume=True).steps == 12


def cut(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path: Path) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def other_step(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"step": 8', '"step": 7'))


def nested(path: Path) -> None:
    (path / "state.json").write_text("[" * 100_000)


def odd_state(path: Path) -> None:
    (path / "state.json").write_text('{"version": 2, "step": [], "extra": 3}')


def no_hashes(path: Path) -> None:
    (path / "hashes.json").unlink()


def poison(path: Path) -> None:
    """As older versions wrote it: weights of NaN, and no hashes."""
    tensors = load_file(path / "tensors.safetensors")
    save_file({**tensors, "module.0.bias": tensors["module.0.bias"] * float("nan")}, path / "tensors.safetensors")
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"version": 2', '"version": 1'))
    (path / "hashes.json").unlink()


def older(path: Path) -> None:
    """A version before hashes, beside hashes, hides a change of the weights."""
    flip(path)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"version": 2', '"version": 1'))


def version_of_nothing(path: Path) -> None:
    flip(path)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"version": 2', '"version": NaN'))


HARMS = (cut, flip, empty, other_step, nested, odd_state, no_hashes, poison, older, version_of_nothing)


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    fit(learner(), tiny(), tmp_path / "whole", progress=QUIET)
    fit(learner(), tiny(), tmp_path / "run", progress=QUIET, stop_after=8)
    before, newest = checkpoints(tmp_path / "run" / "checkpoints")
    harm(newest)
    # Written in between, so that the damaged one is not simply replaced.
    config = tiny(keep_checkpoints=1, checkpoint_every=3)
    with caplog.at_level(logging.WARNING, "madtp"):
        fit(learner(), config, tmp_path / "run", progress=QUIET, resume=True, stop_after=7)
    assert f"{newest} " in caplog.text
    assert f"resuming from {before}" in caplog.text
    assert [path.name for path in checkpoints(before.parent)] == ["step-00000007"]
    fit(learner(), config, tmp_path / "run", progress=QUIET, resume=True)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name


def forge(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change a checkpoint as someone would who wants it to be read."""
    tensors, state = load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text())
    change(tensors, state)
    save_file(tensors, path / "tensors.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    hashes = {name: sha256_of(path / name) for name in ("tensors.safetensors", "state.json")}
    (path / "hashes.json").write_text(json.dumps(hashes))


STEP = "optimiser.0.0.step"
FORGED: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], object]] = {
    "float8 weights": lambda t, s: t.update({"module.0.bias": t["module.0.bias"].to(torch.float8_e4m3fn)}),
    "complex weights": lambda t, s: t.update({"module.0.bias": t["module.0.bias"].to(torch.complex64)}),
    "whole weights": lambda t, s: t.update({"module.0.bias": t["module.0.bias"].long()}),
    "too large weights": lambda t, s: t.update({"module.0.bias": t["module.0.bias"].double() + 1e300}),
    "a negative step": lambda t, s: t.update({STEP: t[STEP] - 100}),
    "a step for each weight": lambda t, s: t.update({STEP: torch.zeros(40, 6)}),
    "a moment that is a number": lambda t, s: t.update({"optimiser.0.0.exp_avg": torch.tensor(0.0)}),
    "complex moments": lambda t, s: t.update({"optimiser.0.0.exp_avg": torch.zeros(40, 6, dtype=torch.complex64)}),
    "a moment less": lambda t, s: t.pop("optimiser.0.0.exp_avg"),
    "a parameter counted from the end": lambda t, s: t.update({"optimiser.0.-1.exp_avg": torch.zeros(2)}),
    "a value without a place": lambda t, s: t.update({"optimiser.x": torch.zeros(2)}),
    "a list for a number": lambda t, s: s["scalars"].update({STEP: [1]}),
    "an infinite number": lambda t, s: s["scalars"].update({STEP: float("inf")}),
    "an infinite layout": lambda t, s: s.update(optimisers=[[float("inf")]]),
    "a config without end": lambda t, s: s.update(config=nest(200)),
}


def nest(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"a": inner}
    return inner


@pytest.mark.parametrize("forged", FORGED)
def test_forged_checkpoints_are_refused_and_nothing_is_changed(tmp_path: Path, forged: str) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=4)
    (path,) = checkpoints(tmp_path / "checkpoints")
    forge(path, FORGED[forged])
    made = learner()
    before = {name: value.clone() for name, value in made.module.state_dict().items()}
    with pytest.raises(CheckpointError, match="step-00000004"):
        fit(made, tiny(), tmp_path, progress=QUIET, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in made.module.state_dict().items())


def test_where_all_checkpoints_are_damaged_each_is_named(tmp_path: Path) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=8)
    for path in checkpoints(tmp_path / "checkpoints"):
        flip(path)
    with pytest.raises(
        CheckpointError, match=r"step-00000008 is damaged.*step-00000004 is damaged.*start from the beginning"
    ):
        fit(learner(), tiny(), tmp_path, progress=QUIET, resume=True)


CHANGES: dict[str, Any] = {
    "steps": 20,
    "learning_rate": 2e-2,
    "warmup_steps": 5,
    "optimiser": "muon",
    "weight_decay": 0.0,
    "betas": [0.8, 0.98],
    "clip_norm": 0.5,
    "precision": "bfloat16",
    "seed": 1,
    "threads": 0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_config_is_refused_and_the_difference_named(tmp_path: Path, name: str) -> None:
    fit(learner(), tiny(threads=1), tmp_path, progress=QUIET, stop_after=4)
    changed = tiny(**{"threads": 1, name: CHANGES[name]})
    with pytest.raises(
        CheckpointError, match=rf"config: training\.{name} is [^;]* there and [^;]* here\..*--resume-anyway"
    ):
        fit(learner(), changed, tmp_path, progress=QUIET, resume=True)


def test_what_cannot_change_the_result_may_differ(tmp_path: Path) -> None:
    free = {"log_every": 1, "evaluate_every": 3, "checkpoint_every": 5, "keep_checkpoints": 4}
    fit(learner(), tiny(), tmp_path / "whole", progress=QUIET)
    fit(learner(), tiny(), tmp_path / "run", progress=QUIET, stop_after=4)
    fit(learner(), tiny(**free), tmp_path / "run", progress=QUIET, resume=True)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name


def test_another_number_of_shares_draws_otherwise(tmp_path: Path) -> None:
    config = tiny(accumulate=2)
    fit(replace(learner(), samples_per_step=2), config, tmp_path, progress=QUIET, stop_after=4)
    with pytest.raises(CheckpointError, match=r"config: processes times accumulate is 2 there and 1 here\. Resume"):
        fit(replace(learner(), samples_per_step=2), tiny(), tmp_path, progress=QUIET, resume=True)


def test_data_and_settings_of_a_recipe_are_compared_too(tmp_path: Path) -> None:
    there = {"recipe": "r", "settings": {"data": "coco", "sizes": (1, 2)}, "data": {"records": "a1"}}
    fit(replace(learner(), depends_on=there), tiny(), tmp_path, progress=QUIET, stop_after=4)
    fit(replace(learner(), depends_on=there), tiny(), tmp_path, progress=QUIET, resume=True, stop_after=4)
    for name, value in (("settings", {"data": "coco", "sizes": [1]}), ("data", {"records": "b2"}), ("recipe", "s")):
        changed = replace(learner(), depends_on={**there, name: value})
        with pytest.raises(CheckpointError, match=rf"with another config: {name}"):
            fit(changed, tiny(), tmp_path, progress=QUIET, resume=True)


def test_resuming_anyway_takes_the_new_values_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=4)
    made = learner()
    with caplog.at_level(logging.WARNING, "madtp"):
        result = fit(made, tiny(learning_rate=1e-5, steps=9), tmp_path, progress=QUIET, resume_anyway=True)
    assert "training.learning_rate is 0.01 there and 1e-05 here" in caplog.text
    assert result.steps == 9
    before = load_file(checkpoints(tmp_path / "checkpoints")[0] / "tensors.safetensors")
    assert result.metrics["lr"] < 1e-5
    moved = max(float((v - made.module.state_dict()[n]).abs().max()) for n, v in module_of(before).items())
    assert moved < 2e-4  # at the old learning rate, it would be a thousand times as much


def module_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}


@pytest.mark.parametrize("anyway", [False, True])
def test_a_run_that_is_shorter_than_what_is_done_is_refused(tmp_path: Path, anyway: bool) -> None:
    fit(learner(), tiny(steps=6, checkpoint_every=0), tmp_path, progress=QUIET)
    with pytest.raises(CheckpointError, match=r"step-00000006 is 6 steps into its run, and training\.steps is 2"):
        fit(learner(), tiny(steps=2), tmp_path, progress=QUIET, resume=True, resume_anyway=anyway)


def test_a_stop_that_is_past_changes_nothing(tmp_path: Path) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=6)
    assert fit(learner(), tiny(), tmp_path, progress=QUIET, resume=True, stop_after=2).steps == 6


def test_a_checkpoint_of_an_older_version_needs_a_decision(tmp_path: Path) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=4)
    (path,) = checkpoints(tmp_path / "checkpoints")
    (path / "hashes.json").unlink()
    content = json.loads((path / "state.json").read_text())
    old = {name: content[name] for name in ("step", "extra")}
    (path / "state.json").write_text(json.dumps({**old, "version": 1, "groups": [], "scalars": {}}))
    with pytest.raises(CheckpointError, match=r"older version of madtp.*--resume-anyway"):
        fit(learner(), tiny(), tmp_path, progress=QUIET, resume=True)
    fit(learner(), tiny(), tmp_path / "whole", progress=QUIET)
    fit(learner(), tiny(), tmp_path, progress=QUIET, resume_anyway=True)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path)[name]), name


def test_other_optimisers_leave_the_module_as_it_was(tmp_path: Path) -> None:
    fit(learner(), tiny(), tmp_path, progress=QUIET, stop_after=4)
    made = learner()
    before = {name: value.clone() for name, value in made.module.state_dict().items()}
    with pytest.raises(CheckpointError, match="with other optimisers than this run has"):
        fit(made, tiny(optimiser="muon"), tmp_path, progress=QUIET, resume_anyway=True)
    assert all(torch.equal(value, before[name]) for name, value in made.module.state_dict().items())


def test_the_command_names_what_differs(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "recipe": "small_recipe",
        "training": {"steps": 4, "warmup_steps": 1, "precision": "float32"},
        "settings": {"width": 3},
    }
    train(config, tmp_path, progress=QUIET, stop_after=2)
    with pytest.raises(CheckpointError, match=r"settings\.width is 3 there and 4 here"):
        train({**config, "settings": {"width": 4}}, tmp_path, progress=QUIET, resume=True)
    assert train(config, tmp_path, progress=QUIET, resume=True).steps == 4


HOLDER = """
import sys, time
from pathlib import Path
from small_learner import QUIET, learner, tiny
from madtp.training import fit
made = learner()
made.before_step = lambda step, module: step < 5 or print("at step 5", flush=True) or time.sleep(100)
fit(made, tiny(), Path(sys.argv[1]), progress=QUIET)
"""


@pytest.mark.slow
def test_a_second_run_to_the_same_folder_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "at step 5"
        for resume in (False, True):
            with pytest.raises(OutputInUseError, match=rf"in use by process {child.pid} on .*choose another output"):
                fit(learner(), tiny(), tmp_path, progress=QUIET, resume=resume)
    finally:
        kill(child)
    assert (tmp_path / "checkpoints" / ".lock").exists()
    assert fit(learner(), tiny(), tmp_path, progress=QUIET, resume=True).steps == 12
    assert not (tmp_path / "checkpoints" / ".lock").exists()


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        fit(learner(nan_at=0), tiny(), tmp_path / "a" / "b", progress=QUIET)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="cannot be written"):
        fit(learner(), TrainingConfig(), tmp_path / "file", progress=QUIET)
    assert os.listdir(tmp_path) == ["file"]
