"""The method's functions against golden data of the authors' code: every pruning call and every output.

The towers run in tests/support/official_reference.py with ``PruningConfig.official()``; tests/data/golden/README.md
describes the data.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from official_reference import DEPTH, Call, Run, run_text, run_vision
from project_paths import DATA
from safetensors.torch import load_file
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.guidance import alignment_loss, mean_over_images

GOLDEN = DATA / "golden"
MANIFEST: dict[str, list[dict[str, Any]]] = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
OUTPUT_TOLERANCE = 1e-4
SCORE_TOLERANCE = 1e-6
PAIRS = 4


@functools.cache
def _load(name: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_file(GOLDEN / f"{name}.safetensors").items()}


def _golden(case: str, name: str) -> Tensor | None:
    return _load("cases").get(f"{case}/{name}")


def _tag(index: int) -> str:
    return f"{'v' if index < DEPTH else 't'}{index}"


@functools.cache
def _run(case: str) -> tuple[Run, Run]:
    _, batch, temperature = case.split("/")
    samples = [int(batch[-1])] if batch.startswith("alone") else list(range(int(batch[1:])))
    data = _load("cases")
    config = PruningConfig.official(temperature=float(temperature[1:]))
    found = [_golden(case, f"{_tag(index)}/order") for index in range(2 * DEPTH)]
    orders = [None if order is None else order.long() for order in found]
    images = data["in/images"][samples + [sample + PAIRS for sample in samples]]
    vision = run_vision(_load("weights_vit"), images, data["in/space_dict"], config, orders[:DEPTH])
    first, second = vision.output.chunk(2)
    ids, mask = data["in/ids"][samples].long(), data["in/attention_mask"][samples]
    text = run_text(_load("weights_nlvr"), ids, mask, (first, second), data["in/space_dict"], config, orders[DEPTH:])
    return vision, text


def _assert_near(ours: Tensor, golden: Tensor | None, tolerance: float, what: str) -> None:
    if golden is None:
        return
    assert ours.shape == golden.shape, what
    assert float((ours - golden).abs().max()) <= tolerance, what


def _assert_same_call(call: Call, case: str, index: int) -> None:
    tag, facts = _tag(index), MANIFEST[case][index]
    _assert_near(call.scores, _golden(case, f"{tag}/score"), SCORE_TOLERANCE, "S")
    for term, name in zip(call.terms.present(), ("self", "token", "cls"), strict=True):
        _assert_near(term, _golden(case, f"{tag}/{name}"), SCORE_TOLERANCE, name)
    _assert_near(call.theta, torch.tensor(facts["theta"]), SCORE_TOLERANCE, "theta")
    slack = 1 if facts["margin"] < 1e-6 else 0
    for ours, golden in zip(call.above.tolist(), facts["above"], strict=True):
        assert abs(ours - golden) <= slack, "tokens above the threshold"
    assert abs(call.count - facts["k"]) <= slack
    assert call.skipped == facts["skipped"]
    if not call.skipped and call.count == facts["k"]:
        order = _golden(case, f"{tag}/order")
        assert order is not None
        kept = torch.zeros_like(call.keep).scatter(1, order.long(), True)
        assert torch.equal(call.keep, kept), "set of kept tokens"
    for ours_mask, name in ((call.mask_in, "mask_in"), (call.mask_out, "mask_out")):
        if ours_mask is not None:
            _assert_near(ours_mask[:, 1:], _golden(case, f"{tag}/{name}"), 0.0, name)


@pytest.mark.parametrize("case", sorted(MANIFEST))
def test_every_pruning_call_agrees(case: str) -> None:
    vision, text = _run(case)
    calls = vision.calls + text.calls
    assert len(calls) == len(MANIFEST[case])
    for index, call in enumerate(calls):
        _assert_same_call(call, case, index)


@pytest.mark.parametrize("case", sorted(MANIFEST))
def test_outputs_agree(case: str) -> None:
    vision, text = _run(case)
    for run, name in ((vision, "vit"), (text, "text")):
        class_output = _golden(case, f"out_cls_{name}")
        assert class_output is not None
        _assert_near(run.output[:, 0], class_output, OUTPUT_TOLERANCE, f"class token, {name}")
        _assert_near(run.output, _golden(case, f"out_{name}"), OUTPUT_TOLERANCE, f"all tokens, {name}")


@pytest.mark.parametrize("case", sorted(MANIFEST))
def test_alignment_loss_agrees(case: str) -> None:
    vision, text = _run(case)
    golden = _golden(case, "loss_sim")
    assert golden is not None
    torch.testing.assert_close(alignment_loss(mean_over_images(vision.features, 2), text.features), golden)
