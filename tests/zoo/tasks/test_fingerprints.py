"""Fingerprints tell any change of records, images and weights, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dataset_files
import pytest

import zoo
from madtp.errors import DataError
from zoo.datasets.records import CaptionedImage, DataSet
from zoo.tasks.fingerprints import fingerprint_checkpoint, fingerprint_data, fingerprint_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    dataset_files.nlvr2_list(tmp_path, "test")
    return tmp_path


def data(root: Path, **options: Any) -> DataSet[Any]:
    return zoo.data("nlvr2", root, "test", **options)


def test_images_are_told_by_size_and_time(root: Path) -> None:
    before = fingerprint_data(data(root))
    assert fingerprint_data(data(root)) == before
    image = data(root).source.path(data(root).records[-1].images[0])  # type: ignore[attr-defined]
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000))
    later = fingerprint_data(data(root))
    assert (later["records"], later["images"] == before["images"]) == (before["records"], False)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint_data(data(root)) == before
    image.write_bytes(image.read_bytes() + b"\0")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint_data(data(root))["images"] != before["images"]
    image.unlink()
    with pytest.raises(DataError, match="images of the data set are not complete"):
        fingerprint_data(data(root))


def test_records_are_told_by_content_and_order() -> None:
    def found(*captions: str, name: str = "scenes_captions") -> object:
        records = [CaptionedImage(str(n), (str(n),), (caption,)) for n, caption in enumerate(captions)]
        return fingerprint_data(DataSet(name, "test", records, source=lambda name: None))["records"]  # type: ignore[arg-type, return-value]

    different = {
        found("a", "b"),
        found("b", "a"),
        found("a", "b", "c"),
        found("a b"),
        found("a", "b\n"),
        found("\ud800"),
    }
    assert len(different) == 6
    assert found("a", "b") == found("a", "b")


def test_drawn_pictures_follow_from_their_names() -> None:
    one, other = (fingerprint_data(zoo.data("scenes", limit=4, seed=seed)) for seed in (0, 1))
    assert set(one) == {"samples", "records"}
    assert one["records"] != other["records"]


def test_weights_are_those_that_shipped_or_files(tmp_path: Path) -> None:
    name = "blip_nlvr_mini"
    assert fingerprint_checkpoint(name, None) == {}
    shipped = {entry.name: entry.sha256 for entry in zoo.describe(name).shipped}
    assert fingerprint_checkpoint(name, "dense") == {"dense": shipped["dense"]}
    assert fingerprint_checkpoint(name, str(tmp_path / "none.safetensors")) == {}
    for file in ("model.safetensors", "config.json", "model-1-of-2.bin", "model.bin.index.json", "notes.txt"):
        (tmp_path / file).write_text("a")
    index = str(tmp_path / "model.bin.index.json")
    before = [fingerprint_checkpoint(name, path) for path in (str(tmp_path), index)]
    (tmp_path / "notes.txt").write_text("evaluated")
    assert [fingerprint_checkpoint(name, path) for path in (str(tmp_path), index)] == before
    (tmp_path / "model-1-of-2.bin").write_text("other")
    after = [fingerprint_checkpoint(name, path) for path in (str(tmp_path), index)]
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_only_files_have_a_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    assert set(fingerprint_files([tmp_path / "a", None, tmp_path, tmp_path / "none"])) == {str(tmp_path / "a")}
