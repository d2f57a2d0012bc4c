"""Saving time: the search for it, and what each site costs and saves."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from torch import Tensor

import madtp
from madtp.errors import CalibrationError, ConfigError
from madtp.tuning import calibration, time_search
from madtp.tuning.batches import calls_of
from madtp.tuning.break_even import break_even
from madtp.tuning.calibration import mac_reduction
from madtp.tuning.time_search import Timing


@pytest.fixture(scope="module")
def model() -> tuple[madtp.PrunedModel, Tensor]:
    torch.manual_seed(0)
    tower = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=48, num_heads=3, img_size=96, num_classes=5)
    images = torch.randn(4, 3, 96, 96)
    return madtp.rewrite(tower.eval(), (images,), config=madtp.PruningConfig(alignment_tokens=4)), images


def takes(share: float, fixed: float):  # type: ignore[no-untyped-def]
    """A clock by which pruned calls take ``share`` of the MACs that are left, and ``fixed`` besides."""

    def time(pruned: madtp.PrunedModel, calls: object) -> Timing:
        return Timing(dense=2.0, pruned=2.0 * (fixed + share * (1.0 - mac_reduction(pruned))))

    return time


@pytest.mark.slow
@pytest.mark.parametrize(("share", "fixed"), [(1.0, 0.0), (0.9, 0.15), (0.7, 0.3)])
def test_the_time_falls_as_wanted(
    model: tuple[madtp.PrunedModel, Tensor], share: float, fixed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, images = model
    monkeypatch.setattr(time_search, "_time", takes(share, fixed))
    found = madtp.calibrate(pruned, [(images,)], reduction=0.3, objective="time", tolerance=0.04)
    assert found.time_reduction == pytest.approx(0.3, abs=0.04)
    assert found.reduction_reached == pytest.approx(1 - (1 - 0.3 - fixed) / share, abs=0.08)
    assert "% less time, " in str(found)


def test_time_that_cannot_be_saved_is_an_error_and_changes_nothing(
    model: tuple[madtp.PrunedModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, images = model
    pruned.gain = 0.5
    monkeypatch.setattr(time_search, "_time", takes(0.1, 0.95))
    with pytest.raises(CalibrationError, match=r"less time.*was not reached|cannot be reached"):
        madtp.calibrate(pruned, [(images,)], reduction=0.3, objective="time")
    assert pruned.gain == 0.5


def test_an_unknown_objective_is_an_error(model: tuple[madtp.PrunedModel, Tensor]) -> None:
    pruned, images = model
    with pytest.raises(ConfigError, match="objective is 'joules'; allowed: 'macs', 'time'"):
        madtp.calibrate(pruned, [(images,)], reduction=0.3, objective="joules")  # type: ignore[arg-type]


def test_a_site_saves_the_macs_up_to_the_next(model: tuple[madtp.PrunedModel, Tensor]) -> None:
    pruned, images = model
    (call,) = calls_of(pruned, [(images,)])
    pruned.gain = 1.0
    balances = break_even(pruned, call, dense_seconds=1.0)
    assert [balance.site for balance in balances] == [site.name for site in pruned.report.sites]
    assert all(balance.cost > 0 and balance.saving >= 0 for balance in balances)
    with torch.no_grad():
        pruned(images)
    before, own = 37, pruned.macs()
    total = sum(pruned.macs_by_module("all").values())
    states = dict(pruned.madtp.control.record.states)
    for balance in balances:
        counts = {name: state.counts for name, state in states.items()}
        counts[balance.site] = torch.full_like(counts[balance.site], before)
        (run,) = pruned.madtp.control.record.runs
        without = sum(run.program.cost.price(run.inputs, counts, active=True).values())
        assert balance.saving == pytest.approx((without - own) / total, abs=1e-9)
        before = int(states[balance.site].counts.max())
        if len(set(states[balance.site].counts.tolist())) > 1:
            break  # the next site's count differs between samples


def test_sites_that_do_not_pay_are_told(
    model: tuple[madtp.PrunedModel, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pruned, images = model
    real = calibration.break_even
    monkeypatch.setattr(calibration, "break_even", lambda model, call: real(model, call, dense_seconds=1e-9))
    with caplog.at_level(logging.INFO, "madtp"):
        madtp.calibrate(pruned, [(images,)], reduction=0.2, tolerance=0.05)
    assert "3 of 3 sites take more time than they save" in caplog.text
    assert "report.plan).without" in caplog.text
    assert not any(balance.worthwhile for balance in pruned.report.balances)
    shown = str(pruned.report)
    assert "costs" in shown
    assert "0.00 ms" in shown
