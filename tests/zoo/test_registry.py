"""The zoo's registry: names, refusals, creation with and without checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import madtp
import zoo
from madtp.errors import CheckpointError, ConfigError, UnknownModelError
from madtp.saving.model_folder import write_folder
from zoo import registry, shipped
from zoo.shipped import ShippedCheckpoint

WEIGHTS = Path(zoo.__file__).parent / "weights"


@pytest.fixture
def empty_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.MODELS, "_entries", {})


def register_linear(name: str, shipped: tuple[ShippedCheckpoint, ...] = ()) -> None:
    zoo.register(
        name,
        description="a linear layer",
        input_size=(3, 8, 8),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="Apache-2.0",
        paper="none",
        shipped=shipped,
    )(lambda: nn.Linear(2, 3))


def test_list_is_sorted_and_filtered() -> None:
    assert zoo.list_models() == sorted(zoo.list_models())
    assert {"blip_nlvr", "blip_nlvr_mini"} <= set(zoo.list_models())
    assert zoo.list_models("blip_nlvr*") == ["blip_nlvr", "blip_nlvr_large", "blip_nlvr_mini"]
    assert zoo.list_models("no such*") == []


def test_entries_describe_themselves() -> None:
    for name in zoo.list_models():
        entry = zoo.describe(name)
        assert entry.name == name
        assert entry.description
        assert entry.licence
        assert entry.paper
        assert len(entry.input_size) == len(entry.mean) == len(entry.std) == 3


@pytest.mark.usefixtures("empty_zoo")
def test_duplicate_is_refused_and_first_stays() -> None:
    register_linear("tiny")
    first = zoo.describe("tiny")
    with pytest.raises(ConfigError, match="'tiny' is registered already"):
        register_linear("tiny")
    assert zoo.describe("tiny") is first


@pytest.mark.usefixtures("empty_zoo")
@pytest.mark.parametrize("name", ["", "Tiny", "ti-ny", "_tiny", "tiny_", "ti__ny", "1tiny", "tiny model", "tiny\n"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a model"):
        register_linear(name)
    assert zoo.list_models() == []


@pytest.mark.usefixtures("empty_zoo")
def test_bad_checkpoint_name_and_missing_description_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot name"):
        register_linear("tiny", (ShippedCheckpoint("../dense.safetensors", 1, ""),))
    with pytest.raises(ConfigError, match="needs a description"):
        zoo.register(
            "tiny", description=" ", input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), licence="x", paper="x"
        )(lambda: nn.Linear(1, 1))


@pytest.mark.parametrize("asked", ["blip_nvlr", "blip_nlvr_min", "blipnlvr"])
def test_unknown_name_lists_near_matches(asked: str) -> None:
    with pytest.raises(UnknownModelError, match=r"Did you mean .*'blip_nlvr"):
        zoo.create(asked)


def test_unknown_name_without_near_match_lists_all() -> None:
    with pytest.raises(UnknownModelError, match=r"Known models: .*blip_nlvr_mini"):
        zoo.create("zzzzzz")


@given(st.text())
def test_any_string_is_known_or_refused(name: str) -> None:
    if name in zoo.list_models():
        assert zoo.describe(name).name == name
    else:
        with pytest.raises(UnknownModelError):
            zoo.describe(name)


@pytest.mark.usefixtures("empty_zoo")
def test_create_loads_a_file(tmp_path: Path) -> None:
    register_linear("tiny")
    saved = {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)}
    save_file(saved, tmp_path / "tiny.safetensors")
    for checkpoint in (tmp_path / "tiny.safetensors", str(tmp_path / "tiny.safetensors")):
        model = zoo.create("tiny", checkpoint)
        assert not model.training
        assert torch.equal(model.state_dict()["weight"], saved["weight"])


@pytest.mark.usefixtures("empty_zoo")
def test_create_names_the_embedded_checkpoints_when_none_fits() -> None:
    register_linear(
        "tiny", (ShippedCheckpoint("dense.safetensors", 1, ""), ShippedCheckpoint("pruned-80/m.safetensors", 1, ""))
    )
    with pytest.raises(CheckpointError, match=r"'dnese' is neither a file, .* \(it has: 'dense', 'pruned-80'\)"):
        zoo.create("tiny", "dnese")
    with pytest.raises(CheckpointError, match="is not there; install the package again"):
        zoo.create("tiny", "dense")


def test_the_index_of_embedded_files_is_up_to_date() -> None:
    """After a change of weights, `zoo.shipped.write_index` writes it anew."""
    index = json.loads((WEIGHTS / "index.json").read_text())
    assert index == shipped.measured_index()
    pruned = {"dense", "pruned-50", "pruned-80"}
    assert all({*zoo.describe(name).checkpoints} in (pruned, {"dense"}) for name in index)
    assert {path.name for path in WEIGHTS.iterdir() if path.is_dir()} == set(index)


# `llava_mini` needs transformers; its own tests load it.
@pytest.mark.parametrize("name", sorted({*json.loads((WEIGHTS / "index.json").read_text())} - {"llava_mini"}))
def test_embedded_dense_weights_load(name: str) -> None:
    model = zoo.create(name, "dense")
    assert all(value.dtype == torch.float32 for value in model.parameters())


@pytest.mark.slow
def test_an_embedded_pruned_model_is_ready_to_run() -> None:
    pruned = zoo.create("clip_mini", "pruned-80")
    assert isinstance(pruned, madtp.PrunedModel)
    assert not pruned.training
    assert all(value.dtype == torch.float32 for value in pruned.parameters())
    card = json.loads((WEIGHTS / "clip_mini" / "pruned-80" / "card.json").read_text())
    assert pruned.gain == card["calibration"]["gain"]
    inputs = zoo.example_inputs(zoo.create("clip_mini"))
    assert pruned(**inputs).image_features.shape == (2, 64)
    assert all(int(counts.max()) < 145 for counts in pruned.token_counts().values())


@pytest.mark.usefixtures("empty_zoo")
def test_a_changed_embedded_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_ALL", tmp_path)
    path = tmp_path / "tiny" / "dense.safetensors"
    path.parent.mkdir()
    save_file({"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)}, path)
    facts = shipped.measured_index()["tiny"]["dense.safetensors"]
    register_linear("tiny", (ShippedCheckpoint("dense.safetensors", **facts),))  # type: ignore[arg-type]
    zoo.create("tiny", "dense")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"dense\.safetensors is damaged or was changed: its SHA-256 is \w{64} "):
        zoo.create("tiny", "dense")
    path.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=rf"has {len(content) - 1} bytes and was shipped with {len(content)}; install"
    ):
        zoo.create("tiny", "dense")
    path.unlink()
    with pytest.raises(CheckpointError, match="is not there; install the package again"):
        zoo.create("tiny", "dense")


@pytest.mark.usefixtures("empty_zoo")
def test_a_changed_config_of_a_shipped_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_ALL", tmp_path)
    write_folder(tmp_path / "tiny" / "pruned-80", {"weight": torch.ones(2)}, {"gain": 1.0})
    ((file, facts),) = shipped.measured_index()["tiny"].items()
    checkpoint = ShippedCheckpoint(file, **facts)  # type: ignore[arg-type]
    assert checkpoint.verified("tiny") == tmp_path / "tiny" / "pruned-80"
    config = tmp_path / "tiny" / "pruned-80" / "config.json"
    config.write_text(config.read_text().replace('"gain": 1.0', '"gain": 0.0'))
    with pytest.raises(CheckpointError, match=r"config\.json is missing or was changed; install the package again"):
        checkpoint.verified("tiny")


@pytest.mark.usefixtures("empty_zoo")
def test_create_loads_the_folder_of_a_pruned_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    register_linear("tiny")
    with pytest.raises(CheckpointError, match="does not describe a model that madtp saved"):
        zoo.create("tiny", tmp_path)


def test_listing_imports_no_model_library() -> None:
    code = (
        "import sys, zoo; zoo.list_models(); "
        "print([name for name in ('timm', 'transformers', 'open_clip') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
