"""Checkpoints that someone else has written to do harm: refused in words, within the memory and time of reading them."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peak_memory import peak_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from madtp.errors import CheckpointError
from madtp.files.limits import DEEPEST
from zoo.checkpoints.key_table import KeyTable, Row, translate
from zoo.checkpoints.loading import resize_position_grid
from zoo.checkpoints.pickles import check_file, check_pickle


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)


STATE = {name: value.clone() for name, value in Net().state_dict().items()}
TREE = b"c__torch__.M\nM\n)\x81"  # an empty module


def refused(path: Path, words: str = "") -> None:
    """Loading is refused with the words, without 50 MiB more than before, and leaves the model alone."""
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    used = peak_bytes()
    with pytest.raises(CheckpointError, match=words):
        zoo.load_checkpoint(model, path)
    assert peak_bytes() - used < 50 << 20
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def with_pickle(path: Path, content: bytes) -> Path:
    """A ``.pth`` file whose pickle is replaced."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return path


def torchscript(path: Path, content: bytes, more: Mapping[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/data.pkl", content)
        for name, data in (more or {}).items():
            archive.writestr(f"m/{name}", data)
    return path


def tensor(elements: int, stride: int) -> bytes:
    """The pickle of a tensor over 12 floats."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
    size = b"J" + struct.pack("<i", elements)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + b"\x85K" + bytes([stride])
        + b"\x85\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def index(folder: Path, places: Mapping[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(
    "shard", ["", ".", "..", "../model.safetensors", "a" * 5000, "a/b", "a\\b", "a\0b", None, 3, ["x"], {}]
)
def test_shards_stay_in_their_folder(tmp_path: Path, shard: object) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    refused(index(tmp_path / "sharded", dict.fromkeys(STATE, shard)), "which is not a file in its folder")


def test_shards_are_files(tmp_path: Path) -> None:
    """A folder as a shard, or a link to the folder of the index, would be read as a checkpoint of its own."""
    folder = index(tmp_path / "sharded", {"a.weight": "inner", "a.bias": "inner"})
    (folder / "inner").mkdir()
    save_file(STATE, folder / "inner" / "model.safetensors")
    refused(folder, "There is no checkpoint file .*inner, which model.safetensors.index.json names")
    (folder / "inner" / "model.safetensors").unlink()
    (folder / "inner").rmdir()
    os.symlink(folder, folder / "inner")
    refused(folder, "There is no checkpoint file")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"weight_map":' * 100_000, '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "3"]
)
def test_odd_indices_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json")


def test_paths_that_no_file_has_are_missing_files() -> None:
    refused(Path("a" * 5000 + ".pth"), "There is no checkpoint file")


KEYS = {
    "nested": b"\x85" * 200_000,
    "nested by marks": b"(" * 200_000 + b"K\x01" + b"t" * 200_000,
    "doubled": b"K\x01" + b"q\x00h\x00\x86" * 60,
    "doubled in text": b"K\x01" + b"p0\ng0\n\x86" * 60,
    "tripled by copies": b"K\x01" + b"22\x87" * 60,
    "nested frozen sets": b"(" * 200_000 + b"K\x01" + b"\x91" * 200_000,
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", ["zip", "legacy", "torchscript"])
def test_keys_that_take_forever_to_hash_are_refused(tmp_path: Path, key: str, kind: str) -> None:
    body = KEYS[key]
    start = b"" if body[:1] == b"(" or body[:1] == b"K" else b")"
    content = b"\x80\x04}" + start + body + b"K\x01s."
    if kind == "zip":
        path = with_pickle(tmp_path / "x.pth", content)
    elif kind == "torchscript":
        path = torchscript(tmp_path / "x.pt", content)
    else:
        (tmp_path / "x.pth").write_bytes(legacy(content))
        path = tmp_path / "x.pth"
    refused(path, f"nests tuples deeper than {DEEPEST} levels, or over and over")


def legacy(content: bytes) -> bytes:
    """A file of PyTorch before 1.6 whose main pickle is replaced."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    end = 0
    for _ in range(3):
        end = check_pickle(whole, end)
    return whole[:end] + content + whole[check_pickle(whole, end) :]


SIZES = {
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "memo in text": b"\x80\x02}p2147483647\n.",
    "bytearray": b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85Rs.",
    "old bytearray": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85Rs.",
    "number": b"\x80\x02}X\x01\x00\x00\x00a\x8a\xff" + b"\x7f" * 255 + b"s.",
    "long number": b"\x80\x02}X\x01\x00\x00\x00a\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b"s.",
    "number in text": b"\x80\x02}X\x01\x00\x00\x00aL" + b"7" * 4000 + b"L\ns.",
    "name of a function": b"\x80\x02}X\x01\x00\x00\x00ac" + b"m" * 20_000 + b"\nf\ns.",
    "encoded again and again": b"\x80\x02}X\x01\x00\x00\x00a"
    + b"c_codecs\nencode\n" * 30
    + b"X\x01\x00\x00\x00xX\x06\x00\x00\x00latin1\x86R"
    + b"X\x03\x00\x00\x00hex\x86R" * 29
    + b"s.",
}


@pytest.mark.parametrize("size", SIZES)
def test_pickles_that_make_objects_of_any_size_are_refused(tmp_path: Path, size: str) -> None:
    refused(with_pickle(tmp_path / "x.pth", SIZES[size]), r"x\.pth is truncated or not a PyTorch file \(its? ")
    refused(
        torchscript(tmp_path / "x.pt", SIZES[size]), r"x\.pt is a damaged TorchScript archive \(ExceededError: its? "
    )


def test_numbers_beside_the_weights_are_kept(tmp_path: Path) -> None:
    content = {"model": STATE, "epoch": 2**64, "best": float("inf"), "note": b"bytes", "shape": ((1, 2), (3, (4, 5)))}
    torch.save(content, tmp_path / "x.pth")
    assert zoo.load_checkpoint(Net(), tmp_path / "x.pth").loaded == 2


@given(
    value=st.recursive(
        st.one_of(
            st.none(), st.integers(-(2**63), 2**63), st.text(), st.binary(max_size=9), st.floats(), st.booleans()
        ),
        lambda inner: st.one_of(
            st.lists(inner), st.tuples(inner, inner), st.tuples(inner), st.dictionaries(st.text(), inner), st.tuples()
        ),
    ),
    protocol=st.integers(0, 5),
)
def test_ordinary_pickles_pass_up_to_their_end(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    assert check_pickle(b"in front" + content + b"behind", 8) == 8 + len(content)


@given(content=st.binary(max_size=60))
def test_anything_else_is_a_value_error(content: bytes) -> None:
    try:
        check_pickle(content)
    except ValueError:
        return
    assert b"." in content


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_passes(tmp_path: Path, zipped: bool) -> None:
    tensors = {"a": torch.ones(3), "b": nn.Parameter(torch.ones(2, 2)), "c": torch.arange(3).expand(2, 3)}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    content = {"model": tensors, "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert check_file(tmp_path / "x.pth") > 0


def test_tensors_are_no_larger_than_their_file(tmp_path: Path) -> None:
    body = b"\x80\x02" + TREE + b"}X\x01\x00\x00\x00a" + tensor(200_000_000, 0) + b"sb."
    path = torchscript(tmp_path / "x.pt", body, {"data/0": b"\0" * 48})
    refused(path, r"x\.pt is a damaged TorchScript archive \(ExceededError: a takes 763 MiB where 64 MiB at most fit\)")
    spread = {"a.weight": torch.zeros(1).expand(20_000, 3000), "a.bias": torch.zeros(3)}
    torch.save(spread, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"x\.pth is damaged: a\.weight takes 229 MiB where 64 MiB at most fit")


@pytest.mark.parametrize("kind", ["torchscript", "pth"])
def test_archives_that_unpack_to_all_memory_are_refused(tmp_path: Path, kind: str) -> None:
    body = b"\x80\x02" + TREE + b"}X\x01\x00\x00\x00a" + tensor(3, 1) + b"sb."
    torchscript(tmp_path / "x.pt", body, {"data/0": b"\0" * (100 << 20)})
    if kind == "pth":
        with (
            zipfile.ZipFile(tmp_path / "x.pt") as old,
            zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                if not name.endswith("constants.pkl"):
                    new.writestr(name, old.read(name))
    refused(
        tmp_path / ("y.pth" if kind == "pth" else "x.pt"),
        "what it holds, unpacked, takes 100 MiB where 64 MiB at most fit",
    )


def test_an_archive_holds_a_name_once(tmp_path: Path) -> None:
    torchscript(tmp_path / "x.pt", b"\x80\x02" + TREE + b"}b.")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("m/data.pkl", b"\x80\x02" + TREE + b"}b.")
    refused(tmp_path / "x.pt", "it holds a name twice")


MODULES = {
    "that hold themselves": b"\x80\x02" + TREE + b"q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "nested": b"\x80\x02" + (TREE + b"}X\x01\x00\x00\x00a") * 5000 + TREE + b"}b" + b"sb" * 5000 + b".",
    "that hold one twice": b"\x80\x02"
    + TREE
    + b"}bq\x00"
    + b"".join(TREE + b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00" for _ in range(60))
    + b".",
}


@pytest.mark.parametrize("tree", MODULES)
def test_modules_in_modules_without_end_are_refused(tmp_path: Path, tree: str) -> None:
    refused(torchscript(tmp_path / "x.pt", MODULES[tree]), "its modules nest deeper than 64 levels, or over and over")


@pytest.mark.parametrize("damage", ["version", "name", "method", "encrypted"])
def test_damaged_archives_are_refused(tmp_path: Path, damage: str) -> None:
    torch.save(STATE, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    entry = content.find(b"PK\x01\x02")
    if damage == "version":
        content[entry + 6] = 99
    elif damage == "name":
        content[entry + 9] |= 8
        content[entry + 46] = 0xFF
    elif damage == "method":
        content[entry + 10] = 77
    else:
        content[entry + 8] |= 1
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", r"x\.pth")


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "compressed": Tensor.to_sparse_csr,
    "without values": lambda value: value.to("meta"),
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "float8 scales": lambda value: value.to(torch.float8_e8m0fnu),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_no_plain_tensors_are_refused(tmp_path: Path, kind: str) -> None:
    torch.save({**STATE, "a.weight": WEIGHTS[kind](STATE["a.weight"])}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"x\.pth holds 1 tensors that are not plain ones \(a\.weight \(")


def test_complex_numbers_do_not_become_whole_ones(tmp_path: Path) -> None:
    model = Net()
    model.register_buffer("ids", torch.arange(3))
    save_file({**STATE, "ids": torch.tensor([0.5j, 1, 2])}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="complex numbers where ids needs"):
        zoo.load_checkpoint(model, tmp_path / "x.safetensors")
    assert model.ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [1e39, -1e300])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_values_that_the_model_cannot_hold_are_refused(tmp_path: Path, value: float, suffix: str) -> None:
    state = {**STATE, "a.bias": torch.tensor([0.0, value, 0.0], dtype=torch.float64)}
    path = tmp_path / f"x{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    refused(path, r"values that the model cannot hold in 1 tensors \(a\.bias\): a\.bias is torch\.float64 in the file")


def test_names_of_tensors_are_not_endless(tmp_path: Path) -> None:
    save_file({"a" * 100_000: torch.zeros(1)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "names a tensor with more than 1000 characters")


def test_parts_that_cannot_be_joined_are_named() -> None:
    table = KeyTable("example", "*", (Row(("q", "k"), "qk"),))
    for other in (torch.ones(2, 4), torch.ones(2), torch.ones(2, 3).half(), torch.tensor(1.0)):
        with pytest.raises(CheckpointError, match=r"the parts of qk \(q, k\) differ in their sizes or types"):
            translate({"q": torch.ones(2, 3), "k": other}, table)
    for first, second in (((), ()), ((3,), ()), ((), (3,))):
        with pytest.raises(CheckpointError, match="differ in their sizes or types"):
            translate({"q": torch.ones(first), "k": torch.ones(second)}, table)


@pytest.mark.parametrize(
    "embedding", [torch.ones(1, 0, 4), torch.ones(1, 1, 4), torch.ones(1, 5, 4, dtype=torch.int64)]
)
def test_what_is_no_position_grid_is_left_for_the_shape_check(embedding: Tensor) -> None:
    assert resize_position_grid(embedding, torch.Size((1, 10, 4))) is embedding
