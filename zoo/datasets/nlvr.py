"""NLVR2 (Suhr et al. 2019), statements about pairs of photographs, in either of its annotation formats.

The corpus itself has a JSON object on each line (``train.json``, ``dev.json``, ``test1.json``), whose identifier gives the
names of the images; BLIP has a list (``nlvr_train.json``, ``nlvr_dev.json``, ``nlvr_test.json``) that names them.
"""

from __future__ import annotations

from typing import Any

from madtp.errors import DataError
from zoo.datasets.files import Entry, entries, find_annotations, named_once, read_json
from zoo.datasets.images import ImageFolder
from zoo.datasets.records import ImageSource, PairStatement
from zoo.datasets.registry import DataEntry, Request, register_data

_FILES = {
    "train": ("nlvr_train.json", "train.json"),
    "val": ("nlvr_dev.json", "dev.json"),
    "test": ("nlvr_test.json", "test1.json"),
}
_IDENTIFIERS = {"train": ("train",), "val": ("dev",), "test": ("test1", "test2", "test")}
_LABELS = ("False", "True")


def open_nlvr2(request: Request) -> tuple[list[Any], ImageSource]:
    """Records of a split, and the folder of their images."""
    root = request.folder()
    path = request.annotations or find_annotations(request.name, root, _FILES[request.split])
    content = read_json(path)
    # A file with a single line is one JSON object.
    listed = entries([content] if isinstance(content, dict) else content, str(path))
    if listed and listed[0].has("identifier"):
        records = [_by_identifier(entry, request.split) for entry in listed]
    else:
        records = [_by_images(entry, f"nlvr2-{request.split}-{number}") for number, entry in enumerate(listed)]
    return named_once(records, listed), ImageFolder(root)


def _by_images(entry: Entry, name: str) -> PairStatement:
    images = entry.texts("images")
    if len(images) != 2:
        raise DataError(f"{entry.place} names {len(images)} images; a statement of NLVR2 is about two.")
    label = _LABELS.index(entry.choice("label", _LABELS))
    return PairStatement(name, (images[0], images[1]), entry.text("sentence"), label)


def _by_identifier(entry: Entry, split: str) -> PairStatement:
    identifier = entry.text("identifier")
    part, *numbers = identifier.split("-")
    if part not in _IDENTIFIERS[split] or len(numbers) != 3:
        raise DataError(
            f"{entry.place} is {identifier!r}, which does not belong to the split {split!r} (they start with "
            f"{' or '.join(_IDENTIFIERS[split])} and have three numbers); name the file of that split."
        )
    stem = identifier.rpartition("-")[0]
    folder = f"train/{entry.name('directory')}" if part == "train" else part
    images = (f"{folder}/{stem}-img0.png", f"{folder}/{stem}-img1.png")
    label = _LABELS.index(entry.choice("label", _LABELS))
    return PairStatement(identifier, images, entry.text("sentence"), label)


register_data(
    DataEntry(
        "nlvr2",
        open_nlvr2,
        "true or false statements about two photographs (NLVR2), in the corpus' or in BLIP's format",
        tasks=("reasoning",),
        splits=tuple(_FILES),
    )
)
