"""The folder format and the record of a call, for any tensors and any call."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.record import record_call, replay_call
from madtp.errors import CheckpointError, ExampleInputsError, UnwritableError
from madtp.saving.model_folder import read_folder, write_folder

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    made = (torch.randn(shape, generator=generator) * 10).to(dtype)
    way = draw(st.sampled_from(["plain", "transposed", "expanded", "sliced"]))
    if way == "transposed" and made.dim() > 1:
        return made.transpose(0, 1)
    if way == "expanded":
        return made.unsqueeze(0).expand(3, *made.shape)
    if way == "sliced" and made.dim():
        return torch.cat([made, made])[: made.shape[0]]
    return made


@settings(suppress_health_check=list(HealthCheck))
@given(values=st.lists(tensors(), min_size=1, max_size=5), tied=st.integers(0, 4), views=st.booleans())
def test_tensors_make_the_round_trip(tmp_path: Path, values: list[Tensor], tied: int, views: bool) -> None:
    named = {f"t{number}": value for number, value in enumerate(values)}
    named["tied"] = values[tied % len(values)]
    if views:
        named["view"] = values[0].flatten()[:1] if values[0].is_contiguous() else values[0]
    write_folder(tmp_path / "model", named, {"note": 1})
    found, description = read_folder(tmp_path / "model")
    assert description["note"] == 1
    assert found.keys() == named.keys()
    for name, value in named.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    write_folder(tmp_path, {"a": weight, "b": weight, "part": weight[:50]}, {})
    content = json.loads((tmp_path / "config.json").read_text())["tensors"]
    assert content["aliases"] == {"b": "a"}
    assert content["bytes"] < 61_000
    whole = json.loads((tmp_path / "config.json").read_text())
    whole["tensors"]["aliases"] = {"b": "missing"}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="damaged"):
        read_folder(tmp_path)


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path: Path) -> None:
    for folder in (tmp_path / "old", tmp_path / "runs" / "new"):
        with full_disk(), pytest.raises(UnwritableError, match=rf"^{folder} cannot be written .*; free space there"):
            write_folder(folder, {"a": torch.ones(100, 100)}, {})
        assert not folder.exists()
        write_folder(folder, {"a": torch.zeros(3)}, {"note": "x" * 5000})
        before = sorted(path.name for path in folder.iterdir())
        with full_disk(), pytest.raises(UnwritableError, match="free space there"):
            write_folder(folder, {"a": torch.ones(3)}, {"note": "x" * 5000})
        assert sorted(path.name for path in folder.iterdir()) == before
        assert not read_folder(folder)[0]["a"].any()


def test_writing_the_same_model_twice_keeps_one_file(tmp_path: Path) -> None:
    for _ in range(2):
        write_folder(tmp_path, {"a": torch.ones(3)}, {})
    assert len(list(tmp_path.iterdir())) == 2


scalars = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(-1, 1), st.text(max_size=3))
arguments = st.recursive(
    st.one_of(scalars, tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=5,
)


@given(
    args=st.lists(arguments, max_size=2), kwargs=st.dictionaries(st.text(min_size=1, max_size=4), arguments, max_size=3)
)
def test_a_replayed_call_is_like_the_recorded_one(args: list[Any], kwargs: dict[str, Any]) -> None:
    recorded = json.loads(json.dumps(record_call(Call(tuple(args), kwargs)), allow_nan=False))
    first, second = replay_call(recorded), replay_call(recorded)
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    made, made_spec = pytree.tree_flatten((first.args, first.kwargs))
    again = pytree.tree_leaves((second.args, second.kwargs))
    assert made_spec == spec
    for old, new, repeated in zip(leaves, made, again, strict=True):
        if not isinstance(old, Tensor):
            assert new == old
            assert type(new) is type(old)
            continue
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert torch.equal(new, repeated)
        if old.numel() and not old.is_floating_point():
            assert torch.equal(new, old)


def test_large_integers_keep_their_range_and_large_floats_their_scale() -> None:
    ids, pixels = torch.randint(3, 9, (2, 20000)), torch.randn(2, 3, 64, 64) * 4 + 7
    made = replay_call(json.loads(json.dumps(record_call(Call((ids,), {"pixels": pixels})))))
    assert (int(made.args[0].min()), int(made.args[0].max())) == (3, 8)
    assert float(made.kwargs["pixels"].mean()) == pytest.approx(7, abs=0.2)
    assert float(made.kwargs["pixels"].std()) == pytest.approx(4, abs=0.2)


def test_objects_that_json_cannot_hold_ask_for_inputs() -> None:
    recorded = record_call(Call((), {"x": torch.ones(2), "cache": object()}))
    with pytest.raises(ExampleInputsError, match=r"builtins\.object.*pass example_inputs"):
        replay_call(recorded)


@pytest.mark.parametrize(
    "content",
    [{}, {"args": 3, "kwargs": {}}, {"args": [], "kwargs": {"x": {"tensor": {}}}}, {"args": [{"odd": 1}], "kwargs": {}}]
    + [{"args": [{"tensor": {"shape": [2], "dtype": dtype}}], "kwargs": {}} for dtype in ("cat", "float31", "")],
)
def test_malformed_records_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ExampleInputsError, match="malformed"):
        replay_call(content)


def test_one_of_two_writers_at_a_time_wins(tmp_path: Path) -> None:
    def write(value: float) -> None:
        for number in range(10):
            with suppress(CheckpointError):  # the other one replaced it at the same moment, and said so
                write_folder(tmp_path / "model", {"weight": torch.full((64, 64), value + number)}, {})

    for _ in range(5):
        writers = [threading.Thread(target=write, args=(value,)) for value in (0.0, 100.0)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert read_folder(tmp_path / "model")[0]["weight"].unique().numel() == 1
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) < 10
