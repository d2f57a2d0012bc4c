"""Rounding that a model amplifies is no fault, wherever it shows; a fault is one however small it is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from detection_hosts import (
    ContrastDetector,
    CutContrastDetector,
    CutDetector,
    Detector,
    SinglePositionDetector,
    SortingDetector,
    detector,
)
from torch import Tensor, nn

import madtp
from madtp.errors import MadtpError
from madtp.programs.compiled_graph import CompiledForward
from madtp.programs.program import Program
from rewriters.regions import walk

RANKING = (Detector, CutDetector, SortingDetector, SinglePositionDetector)


@pytest.mark.parametrize("kind", [*RANKING, ContrastDetector, CutContrastDetector])
def test_amplified_rounding_is_no_fault(kind: type[Detector]) -> None:
    model, inputs = detector(kind)
    pruned = madtp.rewrite(model, inputs)
    assert len(pruned.report.sites) == 4
    assert not pruned.report.unpruned
    with torch.no_grad():
        pruned(**inputs)
    assert all(int(counts.min()) < 20 for counts in pruned.token_counts().values())


def test_what_ranking_exchanges_is_far_beyond_rounding() -> None:
    model, inputs = detector(CutDetector)
    pruned = madtp.rewrite(model, inputs)
    with torch.no_grad(), pruned.dense():
        error = (model(**inputs)["boxes"] - pruned(**inputs)["boxes"]).abs().max()
    assert error > 1e-2


def test_where_scores_are_apart_outputs_agree() -> None:
    model, inputs = detector(CutDetector, faint=1.0)
    pruned = madtp.rewrite(model, inputs)
    with torch.no_grad(), pruned.dense():
        torch.testing.assert_close(model(**inputs), pruned(**inputs), rtol=1e-4, atol=1e-4)


def _off(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Let all programs be wrong."""
    right = Program.outputs

    def wrong(self: Program, forward: CompiledForward, root: nn.Module, leaves: Sequence[object]) -> list[object]:
        return [x + by * x.flip(1) if isinstance(x, Tensor) else x for x in right(self, forward, root, leaves)]

    monkeypatch.setattr(Program, "outputs", wrong)
    monkeypatch.setattr(walk, "MOST_ATTEMPTS", 1)  # what lies below is wrong, too, and takes long


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Detector, CutDetector, CutContrastDetector])
def test_a_graph_that_is_wrong_is_refused(kind: type[Detector], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = detector(kind)
    _off(monkeypatch, 1e-3)
    with pytest.raises(MadtpError, match="differs from the original"):
        madtp.rewrite(model, inputs)


def test_a_region_that_is_wrong_later_runs_as_the_original_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = detector(CutDetector)
    pruned = madtp.rewrite(model, inputs)
    pruned.madtp.forward_of_host.agreements.clear()  # as for a kind of call that is new
    _off(monkeypatch, 1e-3)
    with torch.no_grad():
        torch.testing.assert_close(pruned(**inputs), model(**inputs), rtol=0, atol=0)
    assert len(pruned.report.unpruned) == 1


def test_a_further_kind_of_call_is_judged_alike() -> None:
    model, inputs = detector(CutDetector)
    pruned = madtp.rewrite(model, inputs)
    longer = {name: x if name == "pixels" else torch.cat([x, x], 1) for name, x in inputs.items()}
    with torch.no_grad():
        pruned(**longer)
    assert not pruned.report.unpruned


@pytest.mark.slow
def test_double_precision_itself_has_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = detector(CutDetector)
    _off(monkeypatch, 1e-6)
    with pytest.raises(MadtpError, match="differs from the original"):
        madtp.rewrite(model.double(), {**inputs, "pixels": inputs["pixels"].double()})


class PoolingDetector(Detector):
    """Takes no single sample: its norm needs two values a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(16, 16)

    def detected(self, image: Tensor, words: Tensor) -> dict[str, Tensor]:
        pooled = image.mean(1)
        return {"image": pooled + 1e-3 * self.norm(pooled[..., None])[..., 0]}


def test_a_model_that_takes_no_single_sample_is_not_asked_about_one() -> None:
    model, inputs = detector(PoolingDetector)
    with pytest.raises(ValueError, match="more than 1 value"):
        model(**{name: x[:1] for name, x in inputs.items()})
    assert madtp.rewrite(model, inputs).report.capture == "whole"
