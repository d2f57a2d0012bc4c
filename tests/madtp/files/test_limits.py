"""What files may ask for: names, numbers, depths and sizes, whatever their spelling."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from madtp.errors import CheckpointError
from madtp.files.json_text import parse_json, read_description, read_text
from madtp.files.limits import DEEPEST, LARGEST_COUNT, check_bytes, check_depth, count, finite, is_file_name, shown
from madtp.files.tensors import check_kinds, check_values, overflows, read_safetensors


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "a\\b",
        "..\\x",
        "C:\\x",
        "C:x",
        "a\0b",
        "a" * 256,
        "é" * 128,
        None,
        3,
        ["x"],
        b"x",
    ],
)
def test_what_leaves_a_folder_is_no_file_name(name: object) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize("name", ["x", "model-00001-of-00002.safetensors", "...", ".hidden", "a b", "é", "a" * 255])
def test_plain_names_are_file_names(name: str) -> None:
    assert is_file_name(name)


@given(value=st.one_of(st.integers(), st.floats(), st.none(), st.booleans(), st.text(), st.lists(st.integers())))
def test_numbers_are_what_they_say_or_refused(value: Any) -> None:
    for reader, fits in (
        (finite, type(value) in (int, float) and abs(value) < 1e308),
        (count, type(value) is int and 0 <= value <= LARGEST_COUNT),
    ):
        if fits:
            assert reader(value, "x") == value
        elif type(value) is not int or reader is count:
            with pytest.raises(ValueError, match="x is "):
                reader(value, "x")


@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf, -math.inf, math.nan, True, "1", None, [1]])
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        finite(value, "gain")


def nested(kind: str, depth: int) -> str:
    return {"list": "[" * depth + "]" * depth, "dict": '{"a":' * depth + "1" + "}" * depth}[kind]


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("depth", [DEEPEST + 2, 900, 100_000])
def test_deep_json_is_refused(tmp_path: Path, kind: str, depth: int) -> None:
    (tmp_path / "deep.json").write_text(nested(kind, depth))
    with pytest.raises(ValueError, match=f"nests deeper than {DEEPEST} levels"):
        read_description(tmp_path / "deep.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '[{"a":' * 50_000])
def test_deep_json_that_never_ends_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_json_as_deep_as_allowed_is_read(kind: str) -> None:
    check_depth(json.loads(nested(kind, DEEPEST)))


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"the file takes 1048576 MiB where 64 MiB at most fit"):
        read_description(tmp_path / "sparse.json")
    with pytest.raises(ValueError, match="takes 11 bytes where 10 bytes"):
        check_bytes("it", 11, 10)


def test_text_that_is_not_utf_8_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"one\ntwo\ncaf\xe9\nfour\n")
    with pytest.raises(ValueError, match="line 3 is not UTF-8"):
        read_text(tmp_path / "x.txt")


@given(value=st.recursive(st.one_of(st.integers(), st.text(), st.none()), st.lists))
def test_values_are_shown_short(value: object) -> None:
    assert len(shown(value)) <= 80


def test_huge_and_deep_values_are_shown_short() -> None:
    deep: object = 1
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a list of 1"
    assert shown(10**9999) == "a number of 33216 bits"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (torch.empty(3, device="meta"), "on the meta device"),
        (torch.zeros(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(3).to(torch.float8_e5m2), "float8_e5m2"),
        (torch.zeros(3).to(torch.float8_e8m0fnu), "float8_e8m0fnu"),
    ],
)
def test_tensors_that_models_do_not_hold_are_named(value: torch.Tensor, kind: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"the file holds 1 tensors that are not plain ones \(weight \({kind}\)\)"
    ):
        check_kinds("the file", {"weight": value, "bias": torch.zeros(3)})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_safetensors_of_other_types_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.ones(2).to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds 1 tensors that are not plain"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("value", "dtype", "leaves"),
    [
        (torch.tensor([1e300], dtype=torch.float64), torch.float32, True),
        (torch.tensor([1e38], dtype=torch.float64), torch.float32, False),
        (torch.tensor([1e300], dtype=torch.float64), torch.bfloat16, True),
        (torch.tensor([70000.0]), torch.float16, True),
        (torch.tensor([float("inf")]), torch.float16, False),
        (torch.tensor([70000.0]), torch.bfloat16, False),
        (torch.tensor([2**40]), torch.int32, True),
        (torch.tensor([-1]), torch.uint8, True),
        (torch.tensor([255]), torch.uint8, False),
        (torch.tensor([], dtype=torch.int64), torch.uint8, False),
    ],
)
def test_values_that_leave_the_range_of_a_type(value: torch.Tensor, dtype: torch.dtype, leaves: bool) -> None:
    assert overflows(value, dtype) == leaves
    if leaves:
        with pytest.raises(CheckpointError, match="cannot hold"):
            check_values("the file", own={"a": torch.zeros(1, dtype=dtype)}, stored={"a": value})


def test_different_values_for_one_tensor_are_refused() -> None:
    own = torch.zeros(2)
    stored = {"a": torch.zeros(2), "b": torch.ones(2)}
    check_values("the file", own={"a": own, "b": own.clone()}, stored=stored)
    with pytest.raises(CheckpointError, match="different values for a, b, which are one tensor"):
        check_values("the file", own={"a": own, "b": own}, stored=stored)
