"""Strict checkpoint loading: every fault has an error that names it, and nothing is half loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from madtp.errors import CheckpointError, UnwritableError
from zoo.blip.config import NlvrConfig, TextConfig, VisionConfig
from zoo.blip.nlvr import BlipNlvr
from zoo.checkpoints.loading import resize_position_grid

TINY = NlvrConfig(
    vision=VisionConfig(image_size=16, patch_size=4, width=8, depth=1, heads=2, mlp_width=16),
    text=TextConfig(vocabulary=12, positions=6, width=8, depth=2, heads=2, mlp_width=16, merge_from_layer=1),
)
POSITIONS = "visual_encoder.pos_embed"


def build(config: NlvrConfig = TINY, seed: int = 1) -> BlipNlvr:
    torch.manual_seed(seed)
    return BlipNlvr(config).eval()


def weights(seed: int = 2) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in build(seed=seed).state_dict().items()}


def assert_loads(path: Path, expected: dict[str, Tensor]) -> None:
    model = build()
    zoo.load_checkpoint(model, path)
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def assert_refused(path: Path, message: str, model: nn.Module | None = None) -> None:
    """The file is refused with the message, and no weight of the model has changed."""
    model = build() if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        zoo.load_checkpoint(model, path)
    assert path.name in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_safetensors_round_trip(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "copy.safetensors")
    assert_loads(tmp_path / "copy.safetensors", weights())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_published_pth_layout(tmp_path: Path, zipped: bool) -> None:
    published = weights() | {"text_encoder.embeddings.position_ids": torch.arange(6)[None]}
    optimizer = torch.optim.AdamW(build().parameters()).state_dict()
    content = {"model": published, "optimizer": optimizer, "config": {"lr": 3e-5}, "epoch": 3}
    torch.save(content, tmp_path / "model_base_nlvr.pth", _use_new_zipfile_serialization=zipped)
    assert_loads(tmp_path / "model_base_nlvr.pth", weights())


def test_bare_state_dict_and_half_precision(tmp_path: Path) -> None:
    half = {key: value.half() for key, value in weights().items()}
    torch.save(half, tmp_path / "bare.pt")
    assert_loads(tmp_path / "bare.pt", {key: value.float() for key, value in half.items()})


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with full_disk(), pytest.raises(UnwritableError, match=r"new\.safetensors cannot be written .*; free space there"):
        zoo.save_checkpoint(build(), tmp_path / "runs" / "new.safetensors")
    with pytest.raises(UnwritableError, match=r"file is a file\); choose another name"):
        zoo.save_checkpoint(build(), tmp_path / "file" / "new.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_file(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.pth", "There is no checkpoint file")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"")
    assert_refused(tmp_path / "weights.ckpt", r"ends in '\.ckpt'; a checkpoint ends in one of \.safetensors, \.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    whole = tmp_path / f"whole{suffix}"
    if not whole.exists():
        torch.save({"model": weights()}, whole) if suffix == ".pth" else save_file(weights(), whole)
    content = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(content[: int(share * len(content))])
    assert_refused(cut, "truncated|not a complete safetensors|damaged")


class Hostile:
    """Runs a command when unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": weights(), "config": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pth")
    assert_refused(tmp_path / "hostile.pth", "which are refused since reading them can run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not named tensors"),
        ({"model": {"a": 1.0}}, "holds a float under 'a' where a tensor belongs"),
    ],
)
def test_content_that_is_no_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    assert_refused(tmp_path / "odd.pth", message)


def test_file_of_another_model(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "linear.safetensors")
    total = len(weights())
    assert_refused(
        tmp_path / "linear.safetensors",
        rf"not a checkpoint of this BlipNlvr: of {total} keys {total} missing \(\S+, \S+, \S+, \.\.\.\) "
        r"and 2 unexpected \(bias, weight\)",
    )


@given(data=st.data())
def test_any_missing_or_added_key_is_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.safetensors"
    content = weights()
    key = data.draw(st.sampled_from(sorted(content)))
    if data.draw(st.booleans()):
        content[key + "_m"] = content[key].clone()
        message = rf"1 unexpected \({key}_m\)"
    else:
        del content[key]
        message = rf"1 missing \({key}\)"
    save_file(content, path)
    assert_refused(path, message.replace(".", r"\."))


def test_wrong_shapes(tmp_path: Path) -> None:
    content = weights()
    content["cls_head.2.weight"] = torch.zeros(3, 8)
    content["cls_head.2.bias"] = torch.zeros(3)
    save_file(content, tmp_path / "shapes.safetensors")
    message = r"2 tensors differ \(.*cls_head\.2\.weight is \[3, 8\] in the file and \[2, 8\] in the model"
    assert_refused(tmp_path / "shapes.safetensors", message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights(tmp_path: Path, value: float) -> None:
    content = weights()
    content["cls_head.0.bias"][3] = value
    save_file(content, tmp_path / "diverged.safetensors")
    assert_refused(tmp_path / "diverged.safetensors", r"NaN or infinite values in 1 tensors \(cls_head\.0\.bias\)")


def test_integers_for_floats(tmp_path: Path) -> None:
    content = weights()
    content["cls_head.0.bias"] = torch.zeros(8, dtype=torch.int8)
    save_file(content, tmp_path / "integers.safetensors")
    assert_refused(
        tmp_path / "integers.safetensors", r"integers or complex numbers where cls_head\.0\.bias needs floats"
    )


def test_meta_model_is_refused(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "copy.safetensors")
    with torch.device("meta"):
        model = BlipNlvr(TINY)
    with pytest.raises(CheckpointError, match="meta device"):
        zoo.load_checkpoint(model, tmp_path / "copy.safetensors")


def test_position_embedding_is_resized(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "small.safetensors")
    larger = build(replace(TINY, vision=replace(TINY.vision, image_size=24)))
    zoo.load_checkpoint(larger, tmp_path / "small.safetensors")
    loaded, saved = larger.state_dict(), weights()
    assert loaded[POSITIONS].shape == (1, 37, 8)
    assert torch.equal(loaded[POSITIONS][:, 0], saved[POSITIONS][:, 0])
    assert all(torch.equal(loaded[key], saved[key]) for key in saved if key != POSITIONS)


def test_text_positions_are_not_resized(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "short.safetensors")
    longer = build(replace(TINY, text=replace(TINY.text, positions=9)))
    assert_refused(
        tmp_path / "short.safetensors", r"position_embeddings\.weight is \[6, 8\] in the file and \[9, 8\]", longer
    )


@given(old=st.integers(1, 12), new=st.integers(1, 12), slope=st.floats(-2, 2), seed=st.integers(0, 99))
def test_resizing_keeps_class_token_and_constants(old: int, new: int, slope: float, seed: int) -> None:
    torch.manual_seed(seed)
    class_token = torch.randn(1, 1, 4)
    grid = torch.full((1, old * old, 4), slope)
    resized = resize_position_grid(torch.cat([class_token, grid], dim=1), torch.Size((1, 1 + new * new, 4)))
    assert torch.equal(resized[:, :1], class_token)
    torch.testing.assert_close(resized[:, 1:], torch.full((1, new * new, 4), slope))


@given(side=st.integers(1, 8), seed=st.integers(0, 99))
def test_resizing_to_the_same_side_is_identity(side: int, seed: int) -> None:
    torch.manual_seed(seed)
    embedding = torch.randn(1, 1 + side * side, 4)
    assert torch.equal(resize_position_grid(embedding, embedding.shape), embedding)


def test_resizing_keeps_rows_and_columns_apart() -> None:
    """A grid that varies along rows only still does so after resizing, and stays increasing."""
    rows = torch.arange(4.0).repeat_interleave(4)
    embedding = torch.cat([torch.zeros(1), rows])[None, :, None]
    resized = resize_position_grid(embedding, torch.Size((1, 65, 1)))[0, 1:, 0].reshape(8, 8)
    torch.testing.assert_close(resized, resized[:, :1].expand(8, 8))
    assert (resized[1:, 0] > resized[:-1, 0]).all()


def test_grid_that_cannot_be_resized_is_a_shape_error(tmp_path: Path) -> None:
    content = weights()
    content[POSITIONS] = torch.zeros(1, 12, 8)
    save_file(content, tmp_path / "oblong.safetensors")
    assert_refused(tmp_path / "oblong.safetensors", r"pos_embed is \[1, 12, 8\] in the file and \[1, 17, 8\]")
