"""Calibration reaches what it promises on held-out batches, or says what is reachable and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_vit import images, rewritten
from torch import Tensor

import madtp
from madtp import PrunedModel
from madtp.errors import CalibrationError, ConfigError, ExampleInputsError
from madtp.tuning import calibration
from madtp.tuning.calibration import dense_macs, mac_reduction


@pytest.fixture(autouse=True)
def _without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sites cost and save is measured elsewhere (``test_time.py``)."""
    monkeypatch.setattr(calibration, "break_even", lambda pruned, call: [])


@pytest.fixture(scope="module")
def shared() -> PrunedModel:
    return rewritten()


@pytest.fixture
def pruned(shared: PrunedModel) -> PrunedModel:
    shared.gain, shared.temperature = 1.0, 1.0
    return shared.eval()


def measured(pruned: PrunedModel, batches: list[tuple[Tensor]]) -> float:
    reductions = []
    for batch in batches:
        with torch.no_grad():
            pruned(*batch)
        reductions.append(mac_reduction(pruned))
    return sum(reductions) / len(reductions)


CALIBRATED = [(images(24, seed),) for seed in (1, 2)]
MANY = [(images(24, seed),) for seed in range(1, 5)]
HELD_OUT = [(images(24, seed),) for seed in range(5, 9)]


@pytest.mark.parametrize("reduction", [0.05, 0.2, 0.35, 0.5, 0.65, 0.75])
def test_the_asked_reduction_holds_on_held_out_batches(pruned: PrunedModel, reduction: float) -> None:
    pruned.temperature = 30.0  # the threshold is nearly the mean: samples differ little, so few of them will do
    result = madtp.calibrate(pruned, MANY, reduction=reduction)
    assert result.gain == pruned.gain
    assert result.reduction_reached == pytest.approx(reduction, abs=0.0025)
    assert result.reduction_reached == pytest.approx(1 - result.macs / result.dense_macs)
    assert measured(pruned, HELD_OUT) == pytest.approx(reduction, abs=0.01)
    assert result.evaluations == len(result.history) <= 26


@given(start=st.floats(0.0, 50.0), reduction=st.floats(0.1, 0.7))
def test_the_result_does_not_depend_on_the_gain_before(shared: PrunedModel, start: float, reduction: float) -> None:
    shared.temperature, shared.gain = 1.0, start
    result = madtp.calibrate(shared, [(images(16, 5),)], reduction=reduction)
    assert result.reduction_reached == pytest.approx(reduction, abs=0.01)
    assert measured(shared, [(images(16, 5),)]) == pytest.approx(result.reduction_reached, abs=1e-9)


def test_batches_weigh_by_their_size(pruned: PrunedModel) -> None:
    together = images(12, 6)
    whole = madtp.calibrate(pruned, [(together,)], reduction=0.4)
    pruned.gain = 1.0
    parts = madtp.calibrate(pruned, iter([{"x": together[:9]}, {"x": together[9:]}]), reduction=0.4)
    assert parts.samples == whole.samples == 12
    assert parts.gain == pytest.approx(whole.gain)
    assert parts.macs == pytest.approx(whole.macs)


def test_dense_macs_are_those_at_temperature_zero(pruned: PrunedModel) -> None:
    result = madtp.calibrate(pruned, CALIBRATED[:1], reduction=0.3)
    with pruned.dense(), torch.no_grad():
        pruned(*CALIBRATED[0])
        assert result.dense_macs == pytest.approx(pruned.macs()) == pytest.approx(dense_macs(pruned))
        assert mac_reduction(pruned) == 0.0


def test_the_temperature_is_steered_on_request(pruned: PrunedModel) -> None:
    pruned.gain = 0.9
    result = madtp.calibrate(pruned, CALIBRATED, reduction=0.5, steer="temperature")
    assert (pruned.gain, pruned.temperature) == (0.9, result.temperature)
    assert result.reduction_reached == pytest.approx(0.5, abs=0.01)
    assert "temperature" in str(result)


def test_the_deviation_tells_how_far_other_samples_may_lie(pruned: PrunedModel) -> None:
    few = madtp.calibrate(pruned, CALIBRATED, reduction=0.4)
    assert few.deviation is None
    many = madtp.calibrate(pruned, MANY, reduction=0.4)
    assert many.deviation is not None
    assert abs(measured(pruned, HELD_OUT) - many.reduction_reached) < 6 * many.deviation < 0.3
    same = madtp.calibrate(pruned, CALIBRATED[:1] * 4, reduction=0.4)
    assert same.deviation == pytest.approx(0.0, abs=1e-9)


def test_the_mode_of_every_module_is_restored(pruned: PrunedModel) -> None:
    pruned.train()
    pruned.get_submodule("blocks.1").eval()
    before = [m.training for m in pruned.modules()]
    madtp.calibrate(pruned, CALIBRATED[:1], reduction=0.3)
    assert [m.training for m in pruned.modules()] == before
    assert pruned.training


@pytest.mark.parametrize(
    "settings",
    [
        {"selection": "random"},
        {"selection": "class_attention"},
        {"alignment": False},
        {"batching": "uniform"},
        {"selection": "random", "keep_ratio": 0.9},
        {"selection": "class_attention", "keep_ratio": 0.5},
    ],
)
def test_controls_reach_the_same_macs(settings: dict[str, Any]) -> None:
    control = rewritten(**settings).eval()
    result = madtp.calibrate(control, CALIBRATED, reduction=0.6)
    assert result.reduction_reached == pytest.approx(0.6, abs=0.01)
    assert (result.keep_ratio is None) == ("keep_ratio" not in settings)
    assert control.madtp.config.keep_ratio == result.keep_ratio
    assert measured(control, CALIBRATED) == pytest.approx(result.reduction_reached)


def test_the_message_says_what_is_reachable_and_why(pruned: PrunedModel) -> None:
    pruned.gain = 1.25
    with pytest.raises(CalibrationError) as caught:
        madtp.calibrate(pruned, CALIBRATED[:1], reduction=0.97)
    message = str(caught.value)
    assert "the most is" in message
    assert "min_tokens=1" in message
    assert "alignment tokens" in message
    assert (pruned.gain, pruned.temperature) == (1.25, 1.0)
    pruned.gain = 1e5
    with torch.no_grad():
        pruned(*CALIBRATED[0])
    assert f"{mac_reduction(pruned):.1%}" in message
    shares = [float(word.rstrip("%,")) for word in message.split("Of the dense MACs")[1].split() if "%" in word]
    assert sum(shares) == pytest.approx(100 * (1 - mac_reduction(pruned)), abs=0.2)


def test_a_temperature_that_prunes_too_much_at_least_says_so(pruned: PrunedModel) -> None:
    pruned.gain = 3.0
    with pytest.raises(CalibrationError, match="the least that temperature gives here"):
        madtp.calibrate(pruned, CALIBRATED[:1], reduction=0.02, steer="temperature")
    assert (pruned.gain, pruned.temperature) == (3.0, 1.0)


def test_too_few_samples_for_the_tolerance_say_so(pruned: PrunedModel) -> None:
    with pytest.raises(CalibrationError, match=r"on these 1 samples.*jumps from.*Give more samples"):
        madtp.calibrate(pruned, [(images(1, 9),)], reduction=0.3333, tolerance=1e-7)
    assert pruned.gain == 1.0


@pytest.mark.parametrize("reduction", [0.0, 1.0, -0.1, 1.5, float("nan"), True, "0.5"])
def test_reductions_outside_the_open_interval_are_refused(pruned: PrunedModel, reduction: Any) -> None:
    with pytest.raises(ConfigError, match="reduction is"):
        madtp.calibrate(pruned, CALIBRATED, reduction=reduction)


def test_settings_without_effect_are_refused(pruned: PrunedModel) -> None:
    with pytest.raises(ConfigError, match="keep_ratio"):
        madtp.calibrate(pruned, CALIBRATED, reduction=0.5, steer="keep_ratio")
    with pytest.raises(ConfigError, match="allowed"):
        madtp.calibrate(pruned, CALIBRATED, reduction=0.5, steer="gian")  # type: ignore[arg-type]
    pruned.temperature = 0.0
    with pytest.raises(ConfigError, match="temperature is 0"):
        madtp.calibrate(pruned, CALIBRATED, reduction=0.5)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no batches"),
        ({"x": images(2, 0)}, "list of batches"),
        ([images(2, 0)], "batch 0"),
        ([{"y": 1}], "do not fit"),
    ],
)
def test_wrong_batches_are_refused(pruned: PrunedModel, batches: Any, words: str) -> None:
    with pytest.raises(ExampleInputsError, match=words):
        madtp.calibrate(pruned, batches, reduction=0.5)


def test_nan_is_named() -> None:
    broken = rewritten()
    with pytest.raises(CalibrationError, match="batch 0 holds NaN"):
        madtp.calibrate(broken, [(images(2, 0) * float("nan"),)], reduction=0.5)
    with torch.no_grad():
        broken.get_parameter("blocks.2.mlp.fc1.weight")[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"blocks\.2\.mlp\.fc1\.weight"):
        madtp.calibrate(broken, CALIBRATED, reduction=0.5)
    assert broken.gain == 1.0


def test_other_errors_leave_the_settings_too(pruned: PrunedModel) -> None:
    left = 3

    def interrupt(module: object, args: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    hook = pruned.get_submodule("patch_embed.proj").register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            madtp.calibrate(pruned, CALIBRATED, reduction=0.71)
    finally:
        hook.remove()
    assert pruned.gain == 1.0
