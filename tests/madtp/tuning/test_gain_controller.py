"""The gain controller: converges, stays inside its bounds, and resumes exactly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_vit import images, rewritten

from madtp.errors import CalibrationError, ConfigError
from madtp.tuning.calibration import GainController, mac_reduction


def plant(gain: float, slope: float) -> float:
    """A model whose reduction rises with log(gain) as rewritten ones do."""
    return 0.9 / (1.0 + math.exp(-4 * slope / 0.9 * (math.log(gain) - 0.05)))


@given(target=st.floats(0.1, 0.85), slope=st.floats(0.8, 9.0), start=st.floats(0.5, 3.0))
def test_it_converges_to_any_reachable_target(target: float, slope: float, start: float) -> None:
    controller = GainController(target, gain=start)
    for _ in range(6000):
        controller.step(plant(controller.gain, slope))
    assert plant(controller.gain, slope) == pytest.approx(target, abs=0.01)


@given(target=st.floats(0.2, 0.8), slope=st.floats(1.0, 9.0))
def test_a_ramped_target_is_followed_without_large_overshoot(target: float, slope: float) -> None:
    controller = GainController(0.0, gain=0.9)
    over = 0.0
    for step in range(1500):
        controller.target = target * min(1.0, step / 1000)
        reduction = plant(controller.gain, slope)
        controller.step(reduction)
        over = max(over, reduction - max(controller.target, plant(0.9, slope)))
    assert over < 0.05
    assert reduction == pytest.approx(target, abs=0.03)


def test_it_steers_a_real_model_on_changing_batches() -> None:
    pruned = rewritten().train()
    controller = GainController(0.5, rate=0.03)
    seen = []
    for step in range(120):
        pruned.gain = controller.gain
        with torch.no_grad():
            pruned(images(8, step))
        seen.append(mac_reduction(pruned))
        controller.step(seen[-1])
    assert sum(seen[-30:]) / 30 == pytest.approx(0.5, abs=0.02)


@given(observed=st.lists(st.floats(-0.5, 1.0), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_resuming_repeats_what_would_have_been(observed: list[float], cut: int) -> None:
    whole = GainController(0.6)
    first = GainController(0.6)
    expected = [whole.step(value) for value in observed]
    found = [first.step(value) for value in observed[:cut]]
    second = GainController(0.1, gain=7.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.step(value) for value in observed[cut:]]
    assert found == expected
    assert second.state_dict() == whole.state_dict()


@given(observed=st.lists(st.floats(-1.0, 1.0), max_size=60), rate=st.floats(0.01, 5.0))
def test_the_gain_stays_inside_its_bounds(observed: list[float], rate: float) -> None:
    controller = GainController(0.9, rate=rate, bounds=(0.5, 2.0))
    for value in observed:
        assert 0.5 <= controller.step(value) <= 2.0


@pytest.mark.parametrize("bad", [{"bounds": (0.0, 1.0)}, {"bounds": (2.0, 1.0)}, {"rate": 0.0}, {"smoothing": 1.0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        GainController(0.5, **bad)


def test_bad_values_are_refused() -> None:
    controller = GainController(0.5)
    with pytest.raises(CalibrationError, match="not finite"):
        controller.step(float("nan"))
    assert (controller.gain, controller.observed) == (1.0, None)
    controller.target = 1.0
    with pytest.raises(ConfigError, match="target"):
        controller.step(0.3)
    with pytest.raises(ConfigError, match="state of a gain controller"):
        controller.load_state_dict({"gain": 1.0})
