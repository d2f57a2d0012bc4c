"""What compression recipes share: the target's ramp, steering by the MACs of a step, metrics, TensorBoard, distillation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_training as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.training import fit
from madtp.training.compression import (
    Budget,
    Steering,
    distillation_loss,
    pruning_metrics,
    set_pruning_strength,
    set_reached_strength,
)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.floats(0, 1))
def test_the_target_goes_from_start_to_end_without_a_turn(start: float, end: float, ramp: float) -> None:
    budget = Budget(end, start, ramp)
    targets = [budget.target(step / 50) for step in range(51)]
    assert targets[-1] == pytest.approx(end)
    assert ramp == 0 or targets[0] == pytest.approx(start)
    assert targets == sorted(targets, reverse=start > end)
    assert all(target == pytest.approx(end) for step, target in enumerate(targets) if step / 50 >= ramp)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reduction": 1.0}, "reduction is 1.0"),
        ({"start_reduction": 0.0}, "start_reduction"),
        ({"ramp": 2.0}, "ramp is 2"),
    ],
)
def test_budgets_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**{"reduction": 0.5, **values})


def test_steering_reaches_the_target_by_what_steps_cost(tmp_path: Path) -> None:
    made = tiny.learner(steps=60)
    result = fit(
        made, tiny.config(steps=60, learning_rate=1e-5, final_learning_rate=0.0), tmp_path, progress=tiny.QUIET
    )
    assert made.state["controller"]["target"] == 0.5
    assert made.state["controller"]["observed"] == pytest.approx(0.5, abs=0.05)
    assert result.metrics["gain"] > 1


def test_a_run_that_resumes_behind_its_last_step_has_the_strength_that_it_reached(tmp_path: Path) -> None:
    config = tiny.config(steps=4, checkpoint_every=0)
    gains = []
    for resume in (False, True):
        made = tiny.learner(steps=4)
        assert fit(made, config, tmp_path, progress=tiny.QUIET, resume=resume).steps == 4
        pruned = next(part for part in made.module.modules() if isinstance(part, PrunedModel))
        set_reached_strength(pruned, made.state)
        gains.append(pruned.madtp.gain)
    assert gains[0] == gains[1] == made.state["controller"]["gain"] != 1.0


def test_a_control_with_a_fixed_ratio_is_steered_by_it() -> None:
    pruned = tiny.rewrite(tiny.towers(), selection="random", keep_ratio=0.9, alignment=False)
    inputs = {name: value for name, value in tiny.samples(0, range(4)).items() if name in tiny.INPUTS}
    found = []
    for gain in (1.0, 1.7):
        set_pruning_strength(pruned, gain)
        pruned(**inputs)
        found.append(pruning_metrics(pruned))
    assert [one["keep_ratio"] for one in found] == [0.85, 0.5]
    assert found[0]["reduction"] < found[1]["reduction"]
    assert found[0]["tokens/image.encoder.layers.0"] > found[1]["tokens/image.encoder.layers.0"]


def test_steering_resumes_from_the_learners_state() -> None:
    pruned, state = tiny.rewritten(), {}
    steering = Steering(pruned, Budget(0.5), 10, state)
    steering.before_step(0)
    steering.on_step({"reduction": torch.tensor(0.1)})
    state["controller"] = {"target": 0.2, "gain": 3.0, "observed": 0.3}
    steering.before_step(9)
    assert pruned.gain == 3.0


def test_distillation_is_zero_at_the_teachers_answers_alone() -> None:
    wanted = torch.randn(5, 3)
    assert distillation_loss(wanted + 2.0, wanted) == pytest.approx(0.0, abs=1e-6)
    other = torch.randn(5, 3)
    expected = sum(
        (wanted[i].softmax(0) * (wanted[i].log_softmax(0) - other[i].log_softmax(0))).sum() for i in range(5)
    )
    torch.testing.assert_close(distillation_loss(other, wanted), expected / 5)


def test_tensorboard_holds_losses_strength_and_tokens_of_each_site(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = tiny.learner(steps=4, distil=0.1)
    made.evaluate = lambda module: {"accuracy": 0.25}
    settings = tiny.config(steps=4, tensorboard=True, evaluate_every=2)
    fit(made, settings, tmp_path, progress=tiny.QUIET, stop_after=3)
    fit(made, settings, tmp_path, progress=tiny.QUIET, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = set(events.Tags()["scalars"])
    sites = {f"tokens/{tower}.encoder.layers.{layer}" for tower in ("image", "text") for layer in range(3)}
    train = {"loss", "task", "align", "distil", "reduction", "gain", "lr"}
    assert names == {f"train/{name}" for name in train} | sites | {
        "pruning/temperature",
        "pruning/macs",
        "held out/accuracy",
    }
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_tensorboard_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'madtp\[tensorboard\]'"):
        fit(tiny.learner(steps=1), tiny.config(steps=1, tensorboard=True), tmp_path, progress=tiny.QUIET)
