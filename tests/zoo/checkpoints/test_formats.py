"""Checkpoint formats: published files of each task, transformers' files, sharded ones, TorchScript archives; key tables."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_blip as tasks
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from madtp.errors import CheckpointError
from zoo.checkpoints.files import read_checkpoint
from zoo.checkpoints.key_table import KeyTable, Row, choose, translate

TASKS = sorted(tasks.TASKS)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def published(task: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model, and what a published file of the task holds: the same and more."""
    own = weights(tasks.small(task, seed=5))
    tower = "text_decoder.bert" if task == "caption" else "text_encoder"
    more = {f"{tower}.embeddings.position_ids": torch.arange(40)[None]}
    if task == "retrieval":
        copied = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
        for key, value in own.items():
            if key.startswith(copied):
                more[key.replace(".", "_m.", 1)] = value + 1
        more |= {"image_queue": torch.randn(12, 32), "text_queue": torch.randn(12, 32)}
        more |= {"idx_queue": torch.full((1, 32), -100), "ptr_queue": torch.zeros(1, dtype=torch.long)}
    return own, more


def assert_loaded(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_published_file(tmp_path: Path, task: str) -> None:
    own, more = published(task)
    torch.save({"model": own | more, "optimizer": {}, "epoch": 4}, tmp_path / "model_base.pth")
    model = tasks.small(task)
    report = zoo.load_checkpoint(model, tmp_path / "model_base.pth")
    assert_loaded(model, own)
    assert report.format == "BLIP"
    assert set(report.unused) == more.keys()
    assert report.absent == report.resized == ()
    assert report.loaded == len(own)
    assert f"format BLIP, {len(own)} tensors loaded, {len(more)} unused" in str(report)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["blip_nlvr", "blip_retrieval", "blip_caption", "blip_vqa", "clip_vit_b16"])
def test_published_file_of_full_size(tmp_path: Path, name: str) -> None:
    torch.manual_seed(5)
    own = {key: value.half() for key, value in zoo.create(name).state_dict().items()}
    path = tmp_path / "model.pth"
    torch.save(own if name.startswith("clip") else {"model": own}, path)
    model = zoo.create(name)
    report = zoo.load_checkpoint(model, path)
    assert report.loaded == len(own)
    assert all(torch.equal(value.half(), own[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_file_of_the_authors_code(tmp_path: Path, task: str) -> None:
    own, more = published(task)
    content = {"model": own | more | {"space_dict": torch.randn(100, 16)}, "epoch": 4, "temperature": 2.5}
    torch.save(content, tmp_path / "checkpoint_04.pth")
    model = tasks.small(task)
    report = zoo.load_checkpoint(model, tmp_path / "checkpoint_04.pth")
    assert_loaded(model, own)
    assert (report.format, "space_dict" in report.unused) == ("MADTP", True)
    assert read_checkpoint(tmp_path / "checkpoint_04.pth").settings == {"epoch": 4.0, "temperature": 2.5}


@pytest.mark.parametrize("task", TASKS)
def test_images_of_another_size(tmp_path: Path, task: str) -> None:
    own, _ = published(task)
    torch.save({"model": own}, tmp_path / "small.pth")
    config = replace(tasks.SMALL, vision=replace(tasks.SMALL.vision, image_size=48))
    larger = tasks.small(task, config)
    report = zoo.load_checkpoint(larger, tmp_path / "small.pth")
    assert report.resized == ("visual_encoder.pos_embed",)
    assert larger.visual_encoder.pos_embed.shape == (1, 37, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("visual_encoder.norm.bias"), r"1 missing \(visual_encoder\.norm\.bias\)"),
        (
            lambda own: own.update({"text_decoder.cls.extra": torch.zeros(1)}),
            r"1 unexpected \(text_decoder\.cls\.extra\)",
        ),
        (
            lambda own: own.update({"text_decoder.cls.predictions.decoder.weight": torch.zeros(44, 16)}),
            r"different values for .*word_embeddings\.weight and text_decoder\.cls\.predictions\.decoder\.weight",
        ),
        (lambda own: own.update({"madtp.alignment.tokens": torch.zeros(1)}), r"use madtp\.load for the folder"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: Any, message: str) -> None:
    own, _ = published("caption")
    change(own)
    torch.save({"model": own}, tmp_path / "faulty.pth")
    model = tasks.small("caption")
    before = weights(model)
    with pytest.raises(CheckpointError, match=message):
        zoo.load_checkpoint(model, tmp_path / "faulty.pth")
    assert_loaded(model, before)


def test_file_of_another_task(tmp_path: Path) -> None:
    torch.save({"model": published("vqa")[0]}, tmp_path / "vqa.pth")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this BlipRetrieval: .* missing .* unexpected"):
        zoo.load_checkpoint(tasks.small("retrieval"), tmp_path / "vqa.pth")


def test_tied_weights_are_needed_once(tmp_path: Path) -> None:
    own, _ = published("caption")
    shortened = {
        key: value for key, value in own.items() if not key.startswith("text_decoder.cls.predictions.decoder.")
    }
    save_file(shortened, tmp_path / "model.safetensors")
    model = tasks.small("caption")
    zoo.load_checkpoint(model, tmp_path)
    assert_loaded(model, own)


def shard(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors as transformers does beyond a size: two files and an index."""
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    places = {key: file for file, keys in halves.items() for key in keys}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_sharded_checkpoint(tmp_path: Path) -> None:
    own, _ = published("retrieval")
    index = shard(tmp_path, own)
    for path in (index, tmp_path):
        model = tasks.small("retrieval")
        zoo.load_checkpoint(model, path)
        assert_loaded(model, own)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shard", r"There is no checkpoint file .*model-00002-of-00002\.safetensors"),
        ("key", r"does not hold what model\.safetensors\.index\.json says: 1 keys differ \(temp\)"),
        ("outside", r"names '\.\./model\.safetensors', which is not a file in its folder"),
        ("json", "is not the index of a sharded checkpoint"),
        ("map", "is not the index of a sharded checkpoint"),
    ],
)
def test_faulty_sharded_checkpoint(tmp_path: Path, fault: str, message: str) -> None:
    index = shard(tmp_path, published("retrieval")[0])
    content = json.loads(index.read_text())
    if fault == "shard":
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
    elif fault == "key":
        del content["weight_map"]["temp"]
    elif fault == "outside":
        content["weight_map"]["temp"] = "../model.safetensors"
    elif fault == "map":
        content["weight_map"] = ["temp"]
    index.write_text("{" if fault == "json" else json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        zoo.load_checkpoint(tasks.small("retrieval"), index)


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; looked for model\.safetensors"):
        zoo.load_checkpoint(tasks.small("retrieval"), tmp_path)


class Nested(nn.Module):
    """Linear layers, a norm with buffers, a shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.second = nn.Linear(4, 4, bias=False).half()
        self.again = self.first[0]
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x)) * self.scale


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Nested().eval()
    torch.jit.save(torch.jit.trace(model, torch.randn(2, 4)), tmp_path / "archive.pt")
    return tmp_path / "archive.pt"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_torchscript_archive(archive: Path) -> None:
    expected = torch.jit.load(archive).state_dict()
    found = read_checkpoint(archive).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())
    model = Nested().eval()
    zoo.load_checkpoint(model, archive)
    assert_loaded(model, expected)


def rewrite_archive(archive: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(archive) as old:
        entries = {entry: old.read(entry) for entry in old.namelist()}
    root = next(iter(entries)).partition("/")[0]
    with zipfile.ZipFile(archive, "w") as new:
        for entry, data in entries.items():
            new.writestr(entry, content if entry == f"{root}/{name}" else data)


class Hostile:
    """Runs a command when unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_hostile_torchscript_archive_is_not_run(archive: Path) -> None:
    target = archive.parent / "ran"
    rewrite_archive(archive, "data.pkl", pickle.dumps(Hostile(target), protocol=2))
    with pytest.raises(CheckpointError, match=r"holds posix\.mkdir, which is refused.*torch\.jit\.load"):
        read_checkpoint(archive)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_truncated_torchscript_archive(archive: Path, name: str) -> None:
    rewrite_archive(archive, name, b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"damaged TorchScript archive|beyond its storage"):
        read_checkpoint(archive)


def test_rows_rename_join_and_transpose() -> None:
    table = KeyTable(
        "example",
        "blocks.*",
        (
            Row(("blocks.*.q.*", "blocks.*.k.*"), "layers.*.qk.*"),
            Row("head.weight", "head", transpose=True),
            Row("blocks.*", "layers.*"),
        ),
        ignored=("blocks.*.ids",),
    )
    found = {
        "blocks.0.k.weight": torch.ones(2, 3),
        "blocks.0.q.weight": torch.zeros(2, 3),
        "blocks.0.norm.bias": torch.ones(3),
        "blocks.0.ids": torch.ones(1),
        "head.weight": torch.arange(6.0).view(2, 3),
        "other": torch.ones(1),
    }
    result = translate(found, table)
    assert result.keys() == {"layers.0.qk.weight", "layers.0.norm.bias", "head", "other"}
    assert result["layers.0.qk.weight"][:, 0].tolist() == [0, 0, 1, 1]
    assert result["head"].shape == (3, 2)
    assert choose((table, KeyTable("last")), found).name == "example"
    assert choose((table, KeyTable("last")), ["other"]).name == "last"


def test_rows_that_do_not_fit_are_named() -> None:
    table = KeyTable("example", "*", (Row(("q", "k"), "qk"), Row("a", "b")))
    with pytest.raises(CheckpointError, match="holds q, but not all of q, k, which make qk together"):
        translate({"q": torch.ones(1)}, table)
    with pytest.raises(CheckpointError, match="holds a and b, which both belong to b"):
        translate({"a": torch.ones(1), "b": torch.ones(1)}, table)
