"""The zoo's registry: names, refusals, creation with and without checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import zoo
from madtp.errors import CheckpointError, ConfigError, UnknownModelError
from zoo import registry


@pytest.fixture
def empty_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {})


def register_linear(name: str, checkpoints: tuple[str, ...] = ()) -> None:
    zoo.register(
        name,
        description="a linear layer",
        input_size=(3, 8, 8),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="Apache-2.0",
        paper="none",
        checkpoints=checkpoints,
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
        register_linear("tiny", checkpoints=("../dense",))
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
    register_linear("tiny", checkpoints=("dense",))
    with pytest.raises(CheckpointError, match=r"'dnese' is neither a file .* \(it has: 'dense'\)"):
        zoo.create("tiny", "dnese")
    with pytest.raises(CheckpointError, match="is not there; install the package again"):
        zoo.create("tiny", "dense")


def test_embedded_files_are_declared_and_load() -> None:
    weights = Path(zoo.__file__).parent / "weights"
    for file in weights.glob("*/*.safetensors"):
        entry = zoo.describe(file.parent.name)
        assert file.stem in entry.checkpoints
        zoo.create(entry.name, file.stem)


def test_listing_imports_no_model_library() -> None:
    code = (
        "import sys, zoo; zoo.list_models(); "
        "print([name for name in ('timm', 'transformers', 'open_clip') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
