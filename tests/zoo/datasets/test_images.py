"""Images of data sets: what is read, at which brightness, and what is refused without starting anything."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin, features

from madtp.errors import DataError
from madtp.files.images import FORMATS, _known_formats, read_image, read_upright
from zoo.datasets.images import ImageFolder

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
WIDE = (RAMP * 65535).astype(np.uint16)


def supported(name: str) -> bool:
    return name not in ("AVIF", "WEBP") or bool(features.check(name.lower()))


WRITTEN = [name for name in FORMATS if supported(name)]


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled(tmp_path: Path, name: str, order: str) -> None:
    image = Image.fromarray(WIDE.astype(order) if name.endswith("tif") else WIDE)
    image.save(tmp_path / name)
    pixels = np.asarray(ImageFolder(tmp_path)(name))
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels[..., 0] - 255 * RAMP).max() <= 1
    assert len(np.unique(pixels)) == 64


@pytest.mark.parametrize(
    "values", [RAMP.astype(np.float32), (255 * RAMP).astype(np.float32), (65535 * RAMP).astype(np.int32)]
)
def test_values_without_a_known_white_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "wide.tif")
    with pytest.raises(
        DataError, match=r"wide\.tif has one number a pixel.*nothing says which is white.*convert it to 8 bits"
    ):
        ImageFolder(tmp_path)("wide.tif")


def test_wide_images_in_which_zero_is_white_are_refused(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(WIDE).save(tmp_path / "inverted.tif", tiffinfo=tags)
    with pytest.raises(DataError, match="nothing says which is white"):
        ImageFolder(tmp_path)("inverted.tif")


@pytest.mark.parametrize("name", WRITTEN)
def test_formats_are_told_by_content(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "written", format=name)
    os.rename(tmp_path / "written", tmp_path / "dog.jpg")
    assert np.abs(np.asarray(ImageFolder(tmp_path)("dog.jpg")).mean((0, 1)) - (200, 30, 30)).max() < 8


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize("suffix", ["jpg", "png", "eps", "ps", ""])
def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    programs, mark = tmp_path / "bin", tmp_path / "started"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    name = f"dog.{suffix}".rstrip(".")
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) =\n%%EOF\n")
    with pytest.raises(DataError, match=r"dog.* is damaged or not an image in one of the formats JPEG, PNG"):
        ImageFolder(tmp_path)(name)
    assert not mark.exists()


def test_orientation_is_left_as_it_is_stored(tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 8), (255, 0, 0))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert ImageFolder(tmp_path)("turned.jpg").size == (24, 8)


def test_images_that_would_take_all_memory_are_refused(tmp_path: Path) -> None:
    header = b"P6\n20000 20000\n255\n"
    (tmp_path / "bomb.ppm").write_bytes(header)
    with pytest.raises(DataError, match=r"bomb\.ppm"):
        ImageFolder(tmp_path)("bomb.ppm")


@pytest.mark.parametrize("name", ["a" * 300, "a" * 5000, "a\0b", "\udc80", "none.jpg", "."])
def test_names_that_no_file_has_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="there is no image"):
        ImageFolder(tmp_path)(name)


@pytest.mark.parametrize("name", WRITTEN)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_images_raise_no_other_error(tmp_path: Path, name: str, data: st.DataObject) -> None:
    whole = tmp_path / "whole"
    if not whole.exists():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(whole, format=name)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (tmp_path / "damaged.jpg").write_bytes(content[: data.draw(st.integers(1, max(1, len(content))))])
    with suppress(DataError):
        ImageFolder(tmp_path)("damaged.jpg")


@pytest.mark.parametrize("name", WRITTEN)
def test_truncated_images_are_named(tmp_path: Path, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole", format=name)
    content = (tmp_path / "whole").read_bytes()
    for share in (0.02, 0.3, 0.6):
        (tmp_path / "cut.jpg").write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match=r"cut\.jpg is damaged or not an image"):
            ImageFolder(tmp_path)("cut.jpg")


def test_formats_that_this_pillow_lacks_do_not_keep_others_from_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _known_formats.cache_clear()
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    Image.new("RGB", (4, 4)).save(tmp_path / "dog.png")
    assert ImageFolder(tmp_path)("dog.png").size == (4, 4)
    _known_formats.cache_clear()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_to_look_at_are_turned_as_their_exif_data_say(tmp_path: Path, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new(mode, (12, 8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (12, 8)
    assert read_upright(tmp_path / "turned.jpg").size == (8, 12)
