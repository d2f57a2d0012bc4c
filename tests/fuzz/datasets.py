"""Readers of data sets: annotations, vocabularies, images. See :data:`READERS`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dataset_files
import numpy as np
import torch
from PIL import Image, features

import zoo.datasets
from madtp.files.images import read_image
from zoo.datasets import CaptionedImage, DataSet, Question, answer_list
from zoo.datasets.records import to_pixels
from zoo.tasks.fingerprints import fingerprint_data
from zoo.tasks.vocabulary import Words, words_for

from .reading import Case, Reader, expect

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "left", "image", "##s", "dog", "two", ".", ",", "café")


def _check_data(data: DataSet[Any], sealed: bool) -> None:
    """Open all samples, and use them as training and evaluation do."""
    fingerprint_data(data)
    for number, record in enumerate(data.records):
        expect(bool(str(record.id)), "a sample has no name")
        if isinstance(record, CaptionedImage):
            expect(bool(record.captions) and all(map(str.strip, record.captions)), "an image has no caption")
        if isinstance(record, Question):
            shares = record.weighted_answers()
            expect(not shares or abs(sum(shares.values()) - record.weight) < 1e-6, "shares do not add up")
        expect(data[number].images.dtype == torch.uint8, "an image is no picture")


def _annotations(folder: Path, *, name: str, split: str, write: Callable[[Path], Any], of: str = "json") -> Case:
    written = write(folder)
    paths = [written] if isinstance(written, Path) else list(written)

    def read(place: Path) -> DataSet[Any]:
        data = zoo.datasets.data(name, place, split)
        fingerprint_data(data)  # finds images that are missing, as every evaluation does
        for number in range(len(data)):
            data[number]
        return data

    files = [(path.relative_to(folder).as_posix(), of) for path in paths]
    return Case(tuple(files), read, _check_data)


def _answers(folder: Path) -> Case:
    (folder / "answers.json").write_text(json.dumps(["yes", "no", "two dogs", "é"]))

    def check(found: tuple[str, ...], sealed: bool) -> None:
        expect(bool(found) and len(set(found)) == len(found) and all(map(str.strip, found)), "answers are odd")

    return Case((("answers.json", "json"),), lambda place: answer_list(place / "answers.json"), check)


def _vocabulary(folder: Path) -> Case:
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    size = len(PIECES) + 2

    def check(words: Words, sealed: bool) -> None:
        ids, mask = words.encode(["the left dogs", "two café.", ""])
        expect(ids.shape == mask.shape and int(ids.max()) < size, "ids are beyond the vocabulary")
        expect(isinstance(words.decode(range(size)), str), "ids have no text")

    return Case((("vocab.txt", "lines"),), lambda place: words_for(size, place / "vocab.txt"), check)


def _image(folder: Path, *, image: Image.Image, **options: Any) -> Case:
    image.save(folder / "image", **options)

    def check(found: Image.Image, sealed: bool) -> None:
        expect(found.mode == "RGB", f"it is of the mode {found.mode}")
        expect(to_pixels(found).shape == (3, found.height, found.width), "it has other pixels")

    seal = _seal_png if options["format"] == "PNG" else None
    return Case((("image", "bytes"),), lambda place: read_image(place / "image"), check, seal=seal)


def _seal_png(place: Path) -> None:
    """Make the checksums right of the parts of a PNG file, as far as their lengths hold."""
    content = bytearray((place / "image").read_bytes())
    first = len(b"\x89PNG\r\n\x1a\n")
    while first + 12 <= len(content):
        end = first + 8 + int.from_bytes(content[first : first + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = zlib.crc32(content[first + 4 : end]).to_bytes(4, "big")
        first = end + 4
    (place / "image").write_bytes(content)


_DRAW = np.random.default_rng(0)
_COLOURS = Image.fromarray(_DRAW.integers(0, 255, (24, 32, 3), dtype=np.uint8))
_WIDE = Image.fromarray(_DRAW.integers(0, 65535, (16, 16), dtype=np.uint16))
_CLEAR = Image.fromarray(_DRAW.integers(0, 255, (16, 16, 4), dtype=np.uint8))

_IMAGES: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
    "jpeg": ("JPEG", _COLOURS, {}),
    "progressive_jpeg": ("JPEG", _COLOURS, {"progressive": True}),
    "png": ("PNG", _COLOURS, {}),
    "png_16_bit": ("PNG", _WIDE, {}),
    "png_palette": ("PNG", _COLOURS.quantize(16), {"transparency": 1}),
    "webp": ("WEBP", _COLOURS, {}),
    "webp_lossless": ("WEBP", _CLEAR, {"lossless": True}),
    "avif": ("AVIF", _COLOURS, {}),
    "gif": ("GIF", _COLOURS.quantize(16), {}),
    "bmp": ("BMP", _COLOURS, {}),
    "tiff": ("TIFF", _COLOURS, {}),
    "tiff_16_bit": ("TIFF", _WIDE, {}),
    "tiff_lzw": ("TIFF", _COLOURS, {"compression": "tiff_lzw"}),
    "ppm": ("PPM", _COLOURS, {}),
}
"""By the name of the reader: a format of Pillow, an image, and how it is saved."""

_ANNOTATIONS: dict[str, tuple[str, str, str, Callable[[Path], Any], str]] = {
    "captions": ("coco", "test", "captions in BLIP's format", lambda p: dataset_files.coco_list(p, "test"), "json"),
    "caption_pairs": ("coco", "train", "an entry a caption", lambda p: dataset_files.coco_list(p, "train"), "json"),
    "karpathy": ("coco", "train", "captions in Karpathy's format", dataset_files.karpathy, "json"),
    "questions": ("vqav2", "val", "VQAv2's two files", dataset_files.vqa_official, "json"),
    "question_list": ("vqav2", "val", "questions in BLIP's format", lambda p: dataset_files.vqa_list(p, "val"), "json"),
    "visual_genome": ("visual_genome", "train", "questions of Visual Genome", dataset_files.visual_genome, "json"),
    "statements": ("nlvr2", "val", "NLVR2's own format", dataset_files.nlvr2_lines, "json lines"),
    "statement_list": ("nlvr2", "train", "statements in BLIP's format", dataset_files.nlvr2_list, "json"),
}
"""By the name of the reader: data set, split, what it is, what writes it, and the format of its annotations."""


def _readable(name: str) -> bool:
    return name not in ("AVIF", "WEBP") or bool(features.check(name.lower()))


READERS = (
    *(
        Reader(reader, f"{about}, with all images", partial(_annotations, name=name, split=split, write=write, of=of))
        for reader, (name, split, about, write, of) in _ANNOTATIONS.items()
    ),
    Reader("answers", "a list of answers", _answers),
    Reader("vocabulary", "a vocabulary of word pieces", _vocabulary),
    *(
        Reader(reader, f"an image in {name}", partial(_image, image=image, format=name, **options))
        for reader, (name, image, options) in _IMAGES.items()
        if _readable(name)
    ),
)
