"""``madtp convert``, and checkpoints of the MADTP authors' code as pruned models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_blip as tasks
import small_clip
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import madtp
import zoo
from madtp.cli.app import app
from madtp.errors import CheckpointError
from zoo import registry
from zoo.blip.config import NlvrConfig
from zoo.blip.nlvr import BlipNlvr
from zoo.checkpoints.official import load_official

# The authors' code has no linear layer for BLIP, so all widths are those of the alignment tokens.
EQUAL = replace(tasks.SMALL, vision=replace(tasks.SMALL.vision, width=16, mlp_width=32))
TEMPERATURE = 2.5


def build(name: str, seed: int = 0) -> Any:
    if name == "clip":
        return small_clip.small(seed)
    if name == "nlvr":
        torch.manual_seed(seed)
        return BlipNlvr(NlvrConfig(EQUAL.vision, EQUAL.text)).eval()
    return tasks.small(name, EQUAL, seed)


def official(name: str, path: Path) -> dict[str, Tensor]:
    """Write a checkpoint as the authors' code does; returns the model's weights and what belongs to pruning."""
    own = {key: value.clone() for key, value in build(name, seed=5).state_dict().items()}
    torch.manual_seed(6)
    added = {"space_dict": torch.randn(7, 16)}
    if name == "clip":
        for tower, width in (("visual.", 24), ("", 16)):
            for block in range(2):
                place = f"{tower}transformer.resblocks.{block}.query_model.q_map.0"
                added |= {f"{place}.weight": torch.randn(16, width), f"{place}.bias": torch.randn(16)}
    torch.save({"model": own | added, "epoch": 14, "temperature": TEMPERATURE}, path)
    return own | added


@pytest.fixture
def small_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zoo with small models only."""
    monkeypatch.setattr(registry.MODELS, "_entries", {})
    half = (0.5, 0.5, 0.5)
    for name in ("nlvr", "retrieval", "caption", "vqa", "clip"):
        zoo.register(name, description=name, input_size=(3, 32, 32), mean=half, std=half, licence="none", paper="none")(
            lambda name=name: build(name)
        )


@pytest.mark.usefixtures("small_zoo")
@pytest.mark.parametrize("name", ["nlvr", "clip"])
def test_authors_checkpoint_becomes_a_pruned_model(tmp_path: Path, name: str) -> None:
    written = official(name, tmp_path / "checkpoint_best.pth")
    arguments = ["convert", str(tmp_path / "checkpoint_best.pth"), str(tmp_path / "pruned"), "--model", name, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["format"], report["unused"], report["loaded"]) == ("MADTP", [], len(written))
    pruned = madtp.load(tmp_path / "pruned")
    assert pruned.temperature == TEMPERATURE
    assert pruned.madtp.config.batching == "uniform"
    state = pruned.state_dict()
    assert torch.equal(state["madtp.alignment.tokens"], written["space_dict"])
    assert all(torch.equal(state[key], value) for key, value in written.items() if key in state)
    if name == "clip":
        place = "transformer.resblocks.1.query_model.q_map.0.weight"
        assert torch.equal(state["madtp.sites.transformer_resblocks_1.query.weight"], written[place])
        assert torch.equal(state["madtp.sites.visual_transformer_resblocks_1.query.weight"], written[f"visual.{place}"])
    given = zoo.example_inputs(build(name))
    with torch.no_grad():
        pruned(**given)
    assert min(int(count.min()) for count in pruned.token_counts().values()) > 0


@pytest.mark.parametrize("name", ["retrieval", "caption", "vqa"])
def test_authors_checkpoints_of_other_tasks(tmp_path: Path, name: str) -> None:
    written = official(name, tmp_path / "checkpoint_04.pth")
    found = load_official(build(name), tmp_path / "checkpoint_04.pth")
    state = found.pruned.state_dict()
    assert state.keys() == (written.keys() - {"space_dict"}) | {"madtp.alignment.tokens"}
    assert found.pruned.temperature == TEMPERATURE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("temperature"), "holds no temperature beside the weights"),
        (
            lambda content: content["model"].pop("space_dict"),
            "holds no alignment tokens, so it is not a checkpoint of the MADTP",
        ),
        (lambda content: content["model"].update(space_dict=torch.zeros(3)), r"have the shape \[3\], not \[K, d_e\]"),
        (
            lambda content: content["model"].pop("transformer.resblocks.1.query_model.q_map.0.bias"),
            r"1 keys are in one of both only \(madtp\.sites\.transformer_resblocks_1\.query\.bias\)",
        ),
        (
            lambda content: content["model"].update(
                {"transformer.resblocks.1.query_model.q_map.0.bias": torch.zeros(3)}
            ),
            r"transformer_resblocks_1\.query\.bias is \[3\] in the file and \[16\] in the model",
        ),
        (lambda content: content["model"].pop("ln_final.bias"), r"1 missing \(ln_final\.bias\)"),
    ],
)
def test_faulty_authors_checkpoints_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "checkpoint_best.pth"
    official("clip", path)
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_official(build("clip"), path)


@pytest.mark.usefixtures("small_zoo")
@pytest.mark.parametrize("name", ["caption", "clip"])
def test_dense_weights(tmp_path: Path, name: str) -> None:
    written = official(name, tmp_path / "checkpoint_best.pth")
    output = tmp_path / "new" / "dense.safetensors"
    arguments = ["convert", str(tmp_path / "checkpoint_best.pth"), str(output), "--model", name]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "unused   space_dict" in result.output
    model = zoo.create(name, checkpoint=output)
    assert all(torch.equal(value, written[key]) for key, value in model.state_dict().items())
    assert [path.name for path in output.parent.iterdir()] == ["dense.safetensors"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "is not overwritten" in again.output


@pytest.mark.usefixtures("small_zoo")
def test_wrong_sources_are_messages(tmp_path: Path) -> None:
    official("caption", tmp_path / "caption.pth")
    for arguments, message in (
        (["caption.pth", "dense.safetensors", "--model", "clip"], "is not a checkpoint of this Clip"),
        (["absent.pth", "dense.safetensors", "--model", "clip"], "There is no checkpoint file"),
        (["caption.pth", "pruned", "--model", "clap"], "has no model 'clap'"),
    ):
        paths = [str(tmp_path / argument) for argument in arguments[:2]]
        result = CliRunner().invoke(app, ["convert", *paths, *arguments[2:]], env={"COLUMNS": "300"})
        assert result.exit_code == 1
        assert message in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["caption.pth"]


def test_saving_does_not_leave_parts(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    zoo.save_checkpoint(model, tmp_path / "linear.safetensors")
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        zoo.save_checkpoint(model, tmp_path / "linear.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written"):
        zoo.save_checkpoint(model, tmp_path / "linear.safetensors" / "below.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["linear.safetensors"]
