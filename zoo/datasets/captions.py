"""COCO and Flickr30k with Karpathy's splits, for captions and retrieval, in either of two annotation formats.

Karpathy's file (``dataset_coco.json``, ``dataset_flickr30k.json``) holds all splits; BLIP has a file for each, with an
entry for each caption in training (``coco_karpathy_train.json``) and for each image in the others.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from madtp.errors import DataError
from zoo.datasets.files import Entry, entries, find_annotations, named_once, read_json
from zoo.datasets.images import ImageFolder
from zoo.datasets.records import CaptionedImage, ImageSource
from zoo.datasets.registry import DataEntry, Opener, Request, register_data

SPLITS = ("train", "val", "test")
# Karpathy keeps 30 k images of COCO's validation set apart as "restval"; the field trains on them, too.
_KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def _open(request: Request, blip: str, karpathy: str, folders: tuple[str, ...]) -> tuple[list[Any], ImageSource]:
    root = request.folder()
    path = request.annotations or find_annotations(request.name, root, (blip.format(split=request.split), karpathy))
    content = read_json(path)
    if isinstance(content, dict):
        records = _of_karpathy(Entry(content, str(path)), request)
    else:
        records = _of_blip(entries(content, str(path)), path)
    return records, ImageFolder(root, (".", *folders))


def _of_karpathy(content: Entry, request: Request) -> list[CaptionedImage]:
    records, chosen, seen = [], [], set()
    for entry in content.entries("images"):
        split = entry.text("split")
        seen.add(split)
        if split not in _KARPATHY[request.split]:
            continue
        folder = f"{entry.text('filepath')}/" if entry.has("filepath") else ""
        captions = tuple(sentence.text("raw").strip() for sentence in entry.entries("sentences"))
        if not captions:
            raise DataError(f"{entry.place} has no captions.")
        number = entry.name("cocoid" if entry.has("cocoid") else "imgid")
        records.append(CaptionedImage(number, (folder + entry.text("filename"),), captions))
        chosen.append(entry)
    if not records:
        raise DataError(
            f"{content.place} holds no images of the split {request.split!r}; it has {', '.join(sorted(seen))}."
        )
    return named_once(records, chosen)


def _of_blip(listed: list[Entry], path: Path) -> list[CaptionedImage]:
    """Entries with one caption each are joined by image, in the order of their first. A caption that people wrote twice stays
    twice, as the published files have it."""
    captions: dict[str, list[str]] = {}
    whole: dict[str, str] = {}
    names: dict[str, str] = {}
    for entry in listed:
        image = entry.text("image")
        if image in captions and (image in whole or entry.is_list("caption")):
            before = whole.get(image, "an entry with a single caption")
            raise DataError(f"{entry.place} lists captions of {image} once more, after {before}; remove one of them.")
        if entry.is_list("caption"):
            whole[image] = entry.place
        captions.setdefault(image, []).extend(entry.texts("caption"))
        name = entry.name("image_id") if entry.has("image_id") else Path(image).stem
        if names.setdefault(image, name) != name:
            raise DataError(f"{entry.place}: {image} is {name!r} here and {names[image]!r} before; {path} is damaged.")
    return [CaptionedImage(names[image], (image,), tuple(texts)) for image, texts in captions.items()]


def _register(name: str, opener: Opener, description: str) -> None:
    register_data(DataEntry(name, opener, description, tasks=("captioning", "retrieval"), splits=SPLITS))


_register(
    "coco",
    partial(_open, blip="coco_karpathy_{split}.json", karpathy="dataset_coco.json", folders=("images",)),
    "photographs with five captions (COCO, Karpathy's splits), in Karpathy's or in BLIP's format",
)
_register(
    "flickr30k",
    partial(
        _open, blip="flickr30k_{split}.json", karpathy="dataset_flickr30k.json", folders=("images", "flickr30k-images")
    ),
    "photographs with five captions (Flickr30k, Karpathy's splits), in Karpathy's or in BLIP's format",
)
