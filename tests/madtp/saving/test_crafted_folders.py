"""Folders that someone else has written or changed: refused before anything large is made, and the model stays as it was."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peak_memory import peak_bytes
from safetensors.torch import load_file, save_file
from small_vit import rewritten, vit
from torch import Tensor

import madtp
from madtp.calls.call import Call
from madtp.calls.record import record_call, recorded_bytes, replay_call
from madtp.errors import CheckpointError, ExampleInputsError, MadtpError
from madtp.saving.eight_bit import SCALE, unpack
from madtp.saving.model_folder import BASE, EIGHT_BIT, STORED, describe_base, read_folder, write_folder

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = madtp.save(rewritten(depth=1), tmp_path_factory.mktemp("crafted") / "saved")
    return (folder / "config.json").read_text(), folder


@pytest.fixture
def folder(saved: tuple[str, Path]) -> Iterator[Path]:
    config, path = saved
    yield path
    (path / "config.json").write_text(config)


def change(folder: Path, how: Change) -> None:
    content = json.loads((folder / "config.json").read_text())
    how(content)
    (folder / "config.json").write_text(json.dumps(content))


def refused(folder: Path, words: str) -> None:
    """Loading is refused with the words, without 50 MiB more than before, and leaves the model alone."""
    model = vit(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    used = peak_bytes()
    with pytest.raises(CheckpointError, match=words):
        madtp.load(folder, model)
    assert peak_bytes() - used < 50 << 20
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


NUMBERS: dict[str, Change] = {
    "width": lambda c: c.update(alignment_width=2_000_000),
    "width 0": lambda c: c.update(alignment_width=0),
    "infinite width": lambda c: c.update(alignment_width=math.inf),
    "tokens": lambda c: c["pruning"].update(alignment_tokens=2_000_000),
    "huge tokens": lambda c: c["pruning"].update(alignment_tokens=10**30),
    "huge temperature": lambda c: c.update(temperature=10**400),
    "infinite gain": lambda c: c.update(gain=math.inf),
    "gain that is no number": lambda c: c.update(gain=math.nan),
    "gain as text": lambda c: c.update(gain="1"),
    "infinite count": lambda c: c.update(static_counts={"x": math.inf}),
    "negative count": lambda c: c.update(static_counts={"x": -1}),
    "huge room": lambda c: c.update(static_room={"x": 2**80}),
    "site without fields": lambda c: c["sites"][0].pop("protected"),
    "site with odd positions": lambda c: c["sites"][0].update(protected=[0, "1"]),
    "site without a name": lambda c: c["sites"][0].update(name=["x"]),
    "sites that are none": lambda c: c.update(sites=3),
    "capture": lambda c: c.update(capture="x"),
    "model": lambda c: c.update(model=[1]),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_the_tensors_do_not_bear_out_are_refused(folder: Path, number: str) -> None:
    change(folder, NUMBERS[number])
    refused(folder, "is damaged: ")


@pytest.mark.parametrize(
    "shape", [[2000, 3, 64, 64], [2, 3, 60_000, 60_000], [2**31, 2], [2**70], [-1, 3], ["a"], [2.0], 3, None]
)
def test_an_example_that_is_larger_than_the_file_is_refused(folder: Path, shape: object) -> None:
    tensor = {"tensor": {"shape": shape, "dtype": "float32"}}
    change(folder, lambda c: c["example"].update(args=[{"list": [{"dict": {"x": tensor}}]}], kwargs={}))
    refused(folder, "cannot be rewritten from what it says of the first call .*pass example_inputs")


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_configurations_are_refused_and_not_overwritten(folder: Path, depth: int) -> None:
    (folder / "config.json").write_text("[" * depth + "]" * depth)
    refused(folder, "config.json is damaged: it is not JSON .*nests deeper than 64 levels")
    with pytest.raises(CheckpointError, match="something other than madtp"):
        write_folder(folder, {"a": torch.zeros(1)}, {})


@pytest.mark.parametrize("name", ["a" * 5000, "..", ".", "", "a/b", "a\\b", "a\0", ["x"], {"x": 1}, None, 3])
def test_names_that_leave_the_folder_are_refused(folder: Path, name: object) -> None:
    change(folder, lambda c: c["tensors"].update(file=name))
    refused(folder, "does not name a file in the folder")


def test_paths_that_no_folder_has_are_missing_folders() -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        madtp.load("a" * 5000, vit(1))


@pytest.mark.parametrize("aliases", [{"a": ["b"]}, {"a": 1}, {"a": {}}, ["ab"], [["a", "b"]], "x", 3, None])
def test_odd_aliases_are_refused(folder: Path, aliases: object) -> None:
    change(folder, lambda c: c["tensors"].update(aliases=aliases))
    refused(folder, "'aliases' is not names by name")


@pytest.mark.parametrize("dtype", ["int8", "bool", "float8_e4m3fn", "nothing", "Tensor", ["x"], 3])
def test_odd_types_of_a_model_are_refused(folder: Path, dtype: object) -> None:
    change(folder, lambda c: c["model"].update(zoo_name="clip_mini", dtype=dtype))
    with pytest.raises(MadtpError, match="no floating-point type of torch"):
        madtp.load(folder)


def test_changed_aliases_are_found_by_the_hash(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    write_folder(tmp_path, {"a": tied, "b": torch.randn(3, 4), "c": tied}, {})
    assert torch.equal(read_folder(tmp_path)[0]["c"], tied)
    for aliases in ({"c": "b"}, {}, {"c": "a", "d": "a"}, {"b": "a"}):
        change(tmp_path, lambda c, new=aliases: c["tensors"].update(aliases=new))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match="differ in which tensors have several names"):
            read_folder(tmp_path)


def test_folders_whose_tensors_do_not_name_aliases_are_read(tmp_path: Path) -> None:
    """As they were written before the tensor file said so."""
    write_folder(tmp_path, {"a": torch.ones(2)}, {})
    change(tmp_path, lambda c: c["tensors"].update(aliases={"b": "a"}))
    rehash(tmp_path, {"a": torch.ones(2)})
    assert read_folder(tmp_path)[0].keys() == {"a", "b"}
    change(tmp_path, lambda c: c["tensors"].update(aliases={"a": "a"}))
    with pytest.raises(CheckpointError, match="missing or there twice"):
        read_folder(tmp_path)


def rehash(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put other tensors into a folder as someone would who wants them to be read."""
    path = next(folder.glob("model-*.safetensors"))
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change(folder, lambda c: c["tensors"].update(bytes=path.stat().st_size, sha256=digest))


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (
            lambda old: torch.full(old.shape, 1e300, dtype=torch.float64),
            "with values that the model's torch.float32 cannot hold",
        ),
        (
            lambda old: torch.zeros(old.shape, dtype=torch.int64),
            "with values that the model's torch.float32 cannot hold",
        ),
        (
            lambda old: torch.zeros(old.shape, dtype=torch.complex64),
            "with values that the model's torch.float32 cannot hold",
        ),
        (lambda old: old.to(torch.float8_e4m3fn), "not plain ones"),
        (lambda old: old.to(torch.float8_e8m0fnu), "not plain ones"),
        (lambda old: old.double(), None),
        (lambda old: old.half(), None),
    ],
)
def test_tensors_of_other_types(tmp_path: Path, new: Callable[[Tensor], Tensor], words: str | None) -> None:
    folder = madtp.save(rewritten(depth=1), tmp_path / "saved")
    tensors = load_file(next(folder.glob("model-*.safetensors")))
    rehash(folder, {**tensors, "cls_token": new(tensors["cls_token"])})
    if words is None:
        madtp.load(folder, vit(1))
    else:
        refused(folder, words)


@pytest.mark.parametrize("kind", ["float8", "sparse"])
def test_models_with_tensors_that_are_not_plain_are_not_saved(tmp_path: Path, kind: str) -> None:
    pruned = rewritten(depth=1)
    value = torch.eye(3)
    pruned.register_buffer("odd", value.to(torch.float8_e8m0fnu) if kind == "float8" else value.to_sparse())
    with pytest.raises(CheckpointError, match=r"the model holds 1 tensors that are not plain ones \(odd \("):
        madtp.save(pruned, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("value", "scale"),
    [
        (torch.ones(1, 40_000, dtype=torch.int8), torch.ones(40_000)),
        (torch.ones(3, 4, dtype=torch.int8), torch.ones(2)),
        (torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1)),
        (torch.ones(3, 4, dtype=torch.int8), torch.ones(3, dtype=torch.int64)),
        (torch.ones(3, 4), torch.ones(3)),
        (torch.ones(3, dtype=torch.int8), torch.ones(3)),
        (torch.tensor(1, dtype=torch.int8), torch.ones(1)),
    ],
)
def test_scales_that_do_not_fit_are_refused_before_they_are_spread(value: Tensor, scale: Tensor) -> None:
    with pytest.raises(CheckpointError, match="not a matrix of int8 with a scale for each row"):
        unpack({"a": value, "a" + SCALE: scale})


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1, 4)}, tmp_path / "dense.safetensors")
    packed = {"a": torch.ones(3, 4, dtype=torch.int8), "a" + SCALE: torch.ones(3)}
    base = describe_base(tmp_path / "dense.safetensors")
    write_folder(tmp_path / "pruned", packed, {STORED: EIGHT_BIT, BASE: base})
    with pytest.raises(
        CheckpointError, match=r"is damaged: a is int8 \[3, 4\], and the tensor that it differs from is float32"
    ):
        read_folder(tmp_path / "pruned")


@pytest.mark.parametrize(
    "recorded",
    [
        {"value": {"a": 1}},
        {"value": [1]},
        {"tensor": {"shape": [1], "dtype": "int8", "values": [10**30]}},
        {"tensor": {"shape": [1], "dtype": "int64", "values": [10**400]}},
        {"tensor": {"shape": [1], "dtype": "int64", "low": 10**30, "high": 10**31}},
        {"tensor": {"shape": [1], "dtype": "float32", "mean": 10**400}},
    ],
)
def test_records_with_odd_values_are_malformed(recorded: dict[str, Any]) -> None:
    with pytest.raises(ExampleInputsError, match="malformed"):
        replay_call({"args": [recorded], "kwargs": {}})


def test_bytes_of_a_record_are_those_of_the_call() -> None:
    call = Call((torch.ones(2, 3),), {"x": [{"y": torch.ones(300, dtype=torch.int64)}], "n": 3, "none": None})
    assert recorded_bytes(json.loads(json.dumps(record_call(call)))) == 2 * 3 * 4 + 300 * 8
