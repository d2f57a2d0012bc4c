"""Matrices in eight bits: how far they are rounded, what is shared, and that folders say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from madtp.errors import CheckpointError
from madtp.saving.eight_bit import LARGEST, SCALE, pack, unpack
from madtp.saving.model_folder import BASE, EIGHT_BIT, STORED, describe_base, read_folder, write_folder


def is_matrix(name: str, value: Tensor) -> bool:
    return value.dim() >= 2


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    size=st.floats(1e-6, 1e3),
    seed=st.integers(0, 1000),
)
def test_values_are_off_by_half_a_step_at_most(shape: list[int], dtype: torch.dtype, size: float, seed: int) -> None:
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    packed = pack({"a": value}, is_matrix)
    assert packed["a"].dtype == torch.int8
    assert packed["a" + SCALE].shape == (shape[0],)
    found = unpack(packed)
    assert found.keys() == {"a"}
    assert found["a"].dtype == torch.float32
    step = value.float().flatten(1).abs().amax(1, keepdim=True) / LARGEST
    off = (found["a"] - value.float()).abs().flatten(1)
    assert (off <= 0.501 * step).all()


def test_packed_twice_is_packed_once() -> None:
    once = unpack(pack({"a": torch.randn(6, 7)}, is_matrix))
    assert torch.allclose(unpack(pack(once, is_matrix))["a"], once["a"], rtol=1e-6, atol=0)


def test_rows_of_zeros_and_other_tensors_stay_as_they_are() -> None:
    given = {"zeros": torch.zeros(3, 4), "bias": torch.randn(5).half(), "count": torch.tensor(3)}
    packed = pack(given, is_matrix)
    assert packed["bias"] is given["bias"]
    found = unpack(packed)
    assert torch.equal(found["zeros"], given["zeros"])
    assert found["bias"].dtype == torch.float16
    assert found["count"] is given["count"]


def test_tied_tensors_stay_tied() -> None:
    shared = torch.randn(4, 4)
    packed = pack({"a": shared, "b": shared}, is_matrix)
    assert packed["a"] is packed["b"]
    found = unpack(packed)
    assert found["a"] is found["b"]


@pytest.mark.parametrize("said", [True, False])
def test_a_folder_is_unpacked_where_it_says_so(said: bool, tmp_path: Path) -> None:
    packed = pack({"a": torch.randn(4, 4), "b": torch.randn(3)}, is_matrix)
    write_folder(tmp_path, packed, {STORED: EIGHT_BIT} if said else {})
    found, _ = read_folder(tmp_path)
    wanted = unpack(packed) if said else packed
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value)


def test_a_difference_is_rounded_more_finely_than_the_whole() -> None:
    dense = torch.randn(8, 16)
    trained = dense + 0.1 * torch.randn(8, 16)
    off = [(unpack(pack({"a": trained}, is_matrix, base), base)["a"] - trained).norm() for base in (None, {"a": dense})]
    assert off[1] < 0.25 * off[0]


def test_a_folder_is_read_with_its_base_alone(tmp_path: Path) -> None:
    base = {"a": torch.randn(4, 4), "other": torch.randn(2)}
    path = tmp_path / "dense.safetensors"
    save_file(base, path)
    packed = pack({"a": base["a"] + 1.0, "b": torch.randn(3, 3)}, is_matrix, base)
    write_folder(tmp_path / "pruned", packed, {STORED: EIGHT_BIT, BASE: describe_base(path)})
    found, _ = read_folder(tmp_path / "pruned")
    assert torch.allclose(found["a"], base["a"] + 1.0, atol=1e-6)
    assert torch.equal(found["b"], unpack(packed)["b"])
    save_file({**base, "other": torch.zeros(2)}, path)
    with pytest.raises(
        CheckpointError, match=r"difference from .*dense\.safetensors, which has changed; copy both again"
    ):
        read_folder(tmp_path / "pruned")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"difference from .*dense\.safetensors, which is missing; copy both"):
        read_folder(tmp_path / "pruned")


@pytest.mark.parametrize("base", ["x", {}, [1], {"file": 3}, {"file": "../other.safetensors", "sha256": ""}])
def test_a_damaged_entry_of_the_base_is_named(tmp_path: Path, base: object) -> None:
    write_folder(tmp_path / "pruned", pack({"a": torch.randn(4, 4)}, is_matrix), {STORED: EIGHT_BIT, BASE: base})
    with pytest.raises(CheckpointError, match="its entry 'base' does not name a file"):
        read_folder(tmp_path / "pruned")
