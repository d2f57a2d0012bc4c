"""Saved models come back exactly, or the message says what is wrong with the folder; nothing is left half done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from small_vit import images, rewritten, vit
from torch import Tensor, nn

import madtp
import zoo
import zoo.registry
from madtp import PrunedModel, PruningConfig
from madtp.errors import CheckpointError, ConfigError

NAME = "small_vit_of_the_tests"
LICENCE = "Apache-2.0"


@pytest.fixture(scope="module")
def pruned() -> PrunedModel:
    model = rewritten(depth=2)
    model.gain, model.temperature = 1.07, 2.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


@pytest.fixture(scope="module")
def other() -> PrunedModel:
    return rewritten(depth=2)


@pytest.fixture
def folder(pruned: PrunedModel, tmp_path: Path) -> Path:
    return madtp.save(pruned, tmp_path / "saved")


@pytest.fixture
def zoo_entry() -> Iterator[None]:
    zoo.register(
        NAME,
        description="a small ViT",
        input_size=(3, 64, 64),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        licence=LICENCE,
        paper="none",
    )(lambda: vit(2))
    yield
    zoo.registry.MODELS.remove(NAME)


def outputs(model: PrunedModel) -> Tensor:
    with torch.no_grad():
        return model(images(4, 7))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = config_of(folder)
    edit(content)
    (folder / "config.json").write_text(json.dumps(content))


def tensor_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_outputs_are_reproduced_exactly(pruned: PrunedModel, folder: Path) -> None:
    loaded = madtp.load(folder, vit(2))
    assert (loaded.gain, loaded.temperature, loaded.madtp.config) == (1.07, 2.5, pruned.madtp.config)
    assert torch.equal(outputs(loaded), outputs(pruned))
    assert loaded.token_counts().keys() == pruned.token_counts().keys()
    for name, counts in pruned.token_counts().items():
        assert torch.equal(loaded.token_counts()[name], counts)
    for name, value in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_loaded_model_saves_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = madtp.save(madtp.load(folder, vit(2)), tmp_path / "again")
    assert config_of(again)["tensors"] == config_of(folder)["tensors"]
    assert config_of(again)["sites"] == config_of(folder)["sites"]


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(
    gain=st.floats(0.0, 10.0),
    temperature=st.floats(0.0, 20.0),
    merge=st.booleans(),
    choice=st.sampled_from(
        [
            {},
            {"alignment": False},
            {"selection": "random", "keep_ratio": 0.5},
            {"alignment_width": 12},
            {"protect": {"image": (3, 5)}},
        ]
    ),
    min_tokens=st.integers(0, 5),
)
def test_any_configuration_makes_the_round_trip(
    tmp_path: Path, gain: float, temperature: float, merge: bool, choice: dict[str, Any], min_tokens: int
) -> None:
    first = rewritten(depth=2, merge=merge, min_tokens=min_tokens, temperature=temperature, **choice)
    first.gain = gain
    second = madtp.load(madtp.save(first, tmp_path / "any"), vit(2))
    assert (second.gain, second.temperature, second.madtp.config) == (gain, temperature, first.madtp.config)
    assert torch.equal(outputs(second.eval()), outputs(first.eval()))


def test_zoo_models_are_rebuilt(zoo_entry: None, tmp_path: Path) -> None:
    model = zoo.create(NAME)
    first = madtp.rewrite(model, (images(2, 0),), config=PruningConfig(alignment_tokens=8))
    with torch.no_grad():
        model.get_parameter("cls_token").add_(1.0)
    folder = madtp.save(first, tmp_path / "zoo")
    assert torch.equal(outputs(madtp.load(folder)), outputs(first))
    zoo.registry.MODELS.remove(NAME)
    try:
        with pytest.raises(CheckpointError, match="not registered here"):
            madtp.load(folder)
    finally:
        entry = zoo.ModelEntry(
            NAME, lambda: vit(2), "a small ViT", (3, 64, 64), (0.0,) * 3, (1.0,) * 3, LICENCE, "none"
        )
        zoo.registry.MODELS.add(NAME, entry)


def test_other_models_have_to_be_passed(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"VisionTransformer.*madtp\.load\(folder, model\)"):
        madtp.load(folder)


def test_half_precision_is_cast_back(pruned: PrunedModel, tmp_path: Path) -> None:
    full, half = madtp.save(pruned, tmp_path / "full"), madtp.save(pruned, tmp_path / "half", dtype=torch.float16)
    assert tensor_file(half).stat().st_size < 0.6 * tensor_file(full).stat().st_size
    loaded = madtp.load(half, vit(2))
    for name, value in loaded.state_dict().items():
        assert value.dtype == pruned.state_dict()[name].dtype
        assert torch.equal(value, pruned.state_dict()[name].half().float())
    with pytest.raises(ConfigError, match="dtype"):
        madtp.save(pruned, tmp_path / "half", dtype=torch.int8)


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    large = rewritten(depth=2)
    with torch.no_grad():
        large.get_parameter("cls_token")[..., 0] = 1e6
    with pytest.raises(CheckpointError, match=r"cls_token holds values up to 1e\+06"):
        madtp.save(large, tmp_path / "large", dtype=torch.float16)
    assert not (tmp_path / "large").exists()


def test_frozen_counts_are_kept(tmp_path: Path) -> None:
    first = rewritten(depth=2)
    madtp.freeze(first, [(images(8, 1),)])
    loaded = madtp.load(madtp.save(first, tmp_path / "frozen"), vit(2))
    assert loaded.madtp.config.batching == "static"
    assert torch.equal(outputs(loaded), outputs(first))
    assert all(len(set(counts.tolist())) == 1 for counts in loaded.token_counts().values())


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that torch.export traces."""
    traced: list[str] = []
    export = torch.export.export

    def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        traced.append(type(model).__name__)
        return export(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", recorded)
    return traced


def test_loading_traces_the_model_once(folder: Path, exports: list[str]) -> None:
    madtp.load(folder, vit(2))
    assert len(exports) == 1


def test_an_edited_plan_is_followed(tmp_path: Path, exports: list[str]) -> None:
    import dataclasses

    from madtp.calls.call import Call
    from madtp.calls.copies import share
    from rewriters.pipeline import rewrite_region
    from rewriters.plan.request import Request

    call, config = Call((), {"x": images(2, 0)}), PruningConfig(alignment_tokens=8)
    plan = rewrite_region(Request(share(vit(2)), call, config)).plan
    edited = dataclasses.replace(plan, sites=(dataclasses.replace(plan.sites[1], protected=(0, 9)),))
    first = madtp.rewrite(vit(2), (images(2, 0),), config=config, plan=edited)
    exports.clear()
    loaded = madtp.load(madtp.save(first, tmp_path / "plan"), vit(2))
    assert len(exports) == 2, "once to find the sites, once to prune at the saved ones"
    assert [site.name for site in loaded.report.sites] == ["blocks.1"]
    assert loaded.report.sites[0].protected == (0, 9)
    assert torch.equal(outputs(loaded), outputs(first))


def test_overwriting_replaces_the_model_and_leaves_other_files(other: PrunedModel, folder: Path) -> None:
    (folder / "card.json").write_text("{}")
    old = tensor_file(folder)
    madtp.save(other, folder)
    assert not old.exists()
    assert (folder / "card.json").exists()
    assert torch.equal(outputs(madtp.load(folder, vit(2))), outputs(other))


@pytest.mark.parametrize(
    "place",
    [
        "saving.model_folder.save_file",
        "saving.model_folder.sha256_of",
        "saving.model_folder.publish",
        "saving.model_folder.json.dumps",
        "atomic_files.os.replace",
    ],
)
def test_a_save_that_dies_leaves_the_old_model(
    pruned: PrunedModel, other: PrunedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def die(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"madtp.{place}", die)
        with pytest.raises(KeyboardInterrupt):
            madtp.save(other, folder)
    assert torch.equal(outputs(madtp.load(folder, vit(2))), outputs(pruned))
    madtp.save(pruned, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", tensor_file(folder).name]


def test_a_save_that_dies_at_the_last_rename_leaves_the_old_model(
    pruned: PrunedModel, other: PrunedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def die_at_config(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("madtp.atomic_files.os.replace", die_at_config)
        with pytest.raises(CheckpointError, match="No space left"):
            madtp.save(other, folder)
    assert torch.equal(outputs(madtp.load(folder, vit(2))), outputs(pruned))


def _truncate(folder: Path) -> None:
    path = tensor_file(folder)
    path.write_bytes(path.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    path = tensor_file(folder)
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def _as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, r"damaged: it has \d+ of \d+ bytes"),
    "changed": (_flip, "does not match the hash"),
    "no tensors": (lambda f: tensor_file(f).unlink(), r"lacks model-\w+\.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no config\.json"),
    "no folder": (shutil.rmtree, "there is no folder"),
    "a file": (_as_file, "is not a folder"),
    "no json": (lambda f: (f / "config.json").write_text('{"format'), "is not JSON"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x80"), "is not JSON"),
    "foreign": (
        lambda f: (f / "config.json").write_text('{"model_type": "clip"}'),
        "does not describe a model that madtp",
    ),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "does not describe a model that madtp"),
    "newer": (lambda f: change(f, lambda c: c.update(version=9, madtp="7.0")), r"madtp 7\.0 in format 9.*Upgrade"),
    "no version": (lambda f: change(f, lambda c: c.pop("version")), "its version is None"),
    "no pruning": (lambda f: change(f, lambda c: c.pop("pruning")), "damaged: KeyError"),
    "odd pruning": (lambda f: change(f, lambda c: c["pruning"].update(merg=1)), "did you mean 'merge'"),
    "no tensor entry": (lambda f: change(f, lambda c: c["tensors"].pop("sha256")), "'tensors' is incomplete"),
    "a path": (lambda f: change(f, lambda c: c["tensors"].update(file="../x")), "does not name a file"),
    "odd gain": (lambda f: change(f, lambda c: c.update(gain="much")), "damaged: gain is 'much', not a finite number"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_folders_are_named(folder: Path, damage: str) -> None:
    spoil, words = DAMAGES[damage]
    spoil(folder)
    model = vit(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        madtp.load(folder, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: vit(3), r"12 missing \(blocks\.2\..*\)"),
        (lambda: vit(1), r"12 unexpected \(blocks\.1\..*\)"),
        (
            lambda: vit(2, 64),
            r"of another shape \(cls_token is \[1, 1, 32\] in the folder and \[1, 1, 64\] in the model",
        ),
        (lambda: nn.Linear(2, 2), "does not fit this Linear"),
    ],
)
def test_other_models_are_refused_unchanged(folder: Path, model: Callable[[], nn.Module], words: str) -> None:
    other = model()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        madtp.load(folder, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_nan_is_refused_on_both_sides(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = rewritten(depth=2)
    with torch.no_grad():
        broken.get_parameter("pos_embed")[0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN in 1 tensors \(pos_embed\)"):
        madtp.save(broken, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
    with monkeypatch.context() as patch:
        patch.setattr("madtp.saving.checkpoint._refuse_nan", lambda owner, tensors: None)
        madtp.save(broken, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"NaN in 1 tensors \(pos_embed\)"):
        madtp.load(tmp_path / "nan", vit(2))


def test_folders_of_others_are_not_overwritten(pruned: PrunedModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="something other than madtp"):
        madtp.save(pruned, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        madtp.save(pruned, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        madtp.save(pruned, tmp_path / "file" / "below")


def test_files_are_plain_safetensors_and_json(pruned: PrunedModel, folder: Path) -> None:
    content = config_of(folder)
    assert content["pruning"] == pruned.madtp.config.to_dict()
    assert content["madtp"] == madtp.__version__
    assert content["model"]["class"].endswith(".VisionTransformer")
    with safe_open(tensor_file(folder), "pt") as file:
        assert set(file.keys()) | set(content["tensors"]["aliases"]) == set(pruned.state_dict())


def test_a_model_that_is_captured_otherwise_than_the_saved_one_says_so(tmp_path: Path) -> None:
    """Checks of a rewrite may fail on the inputs that loading makes up."""
    pruned = rewritten(layers=(1,))
    madtp.save(pruned, tmp_path / "saved")
    assert not madtp.load(tmp_path / "saved", vit()).report.notes
    path = tmp_path / "saved" / "config.json"
    content = json.loads(path.read_text())
    assert content["capture"] == "whole"
    path.write_text(json.dumps({**content, "capture": "regions"}))
    (note,) = madtp.load(tmp_path / "saved", vit()).report.notes
    assert "captured as 'regions', this one as 'whole'" in note
