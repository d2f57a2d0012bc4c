"""The paper's settings, each from a published checkpoint and data in the published format to a pruned model's metrics.

By the command line: load strictly, rewrite, calibrate to half of the MACs, evaluate. Models of two blocks a tower in every run,
of base size with `-m heavy`. Weights are random and data small, as neither can be shipped; the formats are exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published_checkpoints
import pytest
import torch
from paper_settings import IMAGES, SETTINGS, WORDS, Setting
from project_paths import ROOT
from shallow_models import shallow
from typer.testing import CliRunner

import madtp
import zoo
from madtp.cli.app import app


def evaluated(setting: Setting, model: str, folder: Path, vocabulary: int) -> dict[str, Any]:
    """Write all files, run `madtp eval`, and return what it wrote."""
    torch.manual_seed(0)
    setting.write_data(folder)
    checkpoint = setting.weights(model, folder)
    arguments = [str(folder / text) if text.endswith(".json") else text for text in setting.arguments]
    if model.startswith("blip"):
        arguments += [
            "--vocabulary",
            str(published_checkpoints.write_vocabulary(folder / "vocab.txt", WORDS, vocabulary)),
        ]
    fixed = ["--model", model, "--checkpoint", str(checkpoint), "--data", setting.data, "--root", str(folder)]
    pruned = ["--reduction", "0.5", "--calibration-split", "val", "--calibration-samples", str(IMAGES)]
    few = ["--split", setting.split, "--limit", str(IMAGES), "--batch-size", str(IMAGES), "--per-sample"]
    output = folder / "evaluation.json"
    outcome = CliRunner().invoke(app, ["eval", *fixed, *pruned, *few, *arguments, "--output", str(output)])
    assert outcome.exit_code == 0, outcome.output
    return json.loads(output.read_text())


def check(setting: Setting, content: dict[str, Any]) -> None:
    assert setting.metrics <= set(content["metrics"])
    assert content["samples"] == IMAGES
    assert content["configuration"]["pruning"]["gain"] > 0
    assert 0.2 < content["compute"]["reduction"] < 0.8
    counts = [count for stage in content["per_sample"][0]["tokens"].values() for count in stage]
    for tower in setting.sites:
        assert any(site.startswith(tower) for site in counts), f"no token of {tower} was counted: {counts}"


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_zoo")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_with_a_shallow_model(tmp_path: Path, name: str) -> None:
    setting = SETTINGS[name]
    check(setting, evaluated(setting, shallow(setting.model), tmp_path, 126))


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_with_the_model_of_base_size(tmp_path: Path, name: str) -> None:
    setting = SETTINGS[name]
    if setting.model.startswith("clip"):
        pytest.importorskip("open_clip")
    check(setting, evaluated(setting, setting.model, tmp_path, published_checkpoints.BERT_SIZE))


def ids(length: int) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.long)


def text(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(length), "attention_mask": ids(length)}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "images", "texts", "expected"),
    [
        ("blip_nlvr", (1, 2, 3, 384, 384), text(36), "132.54 G (two images"),
        ("blip_retrieval", (1, 3, 384, 384), text(35), "70.57 G (a pair"),
        ("blip_caption", (1, 3, 384, 384), text(15), "65.72 G (image"),
        ("blip_vqa", (1, 3, 480, 480), {**text(13), "answer_ids": ids(5), "answer_mask": ids(5)}, "107.17 G (image"),
        ("clip_vit_l14_336", (1, 3, 336, 336), {}, "191.10 G an image"),
        ("clip_vit_l14_336", None, {"input_ids": ids(77)}, "6.66 G a text"),
    ],
)
def test_dense_macs_are_those_of_the_readme(
    model: str, images: tuple[int, ...] | None, texts: dict[str, torch.Tensor], expected: str
) -> None:
    inputs = texts if images is None else {"images": torch.randn(images), **texts}
    macs = madtp.count_macs(zoo.create(model), inputs)
    assert f"{macs / 1e9:.2f} G" in expected
    assert expected in (ROOT / "README.md").read_text(encoding="utf-8")
