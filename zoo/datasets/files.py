"""Reads annotation files and images, with an error for everything that is damaged or of another format.

:func:`read_json` and :class:`Entry` are for annotations, :class:`ImageFolder` opens images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from madtp.errors import DataError

ANNOTATION_FOLDERS = (".", "annotations", "annotation")


@dataclass(frozen=True)
class Entry:
    """One entry of an annotation file, with the place that messages name. Its fields are read by type."""

    content: dict[str, Any]
    place: str

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self._get(name)
        if not isinstance(value, str) or not value.strip():
            raise self._odd(name, value, "some text")
        return value

    def name(self, name: str) -> str:
        """A string or whole number, as a string."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self._odd(name, value, "a number or name")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings with at least one in it, or a string that stands for itself."""
        value = self._get(name)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
            raise self._odd(name, value, "text or a list of texts")
        return tuple(listed)

    def entries(self, name: str) -> list[Entry]:
        """A list of entries."""
        return entries(self._get(name), f"{self.place}, {name!r}")

    def choice(self, name: str, options: Sequence[str]) -> str:
        """One of the options."""
        value = self._get(name)
        if value not in options:
            raise self._odd(name, value, f"one of {', '.join(options)}")
        return str(value)

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self.content

    def _get(self, name: str) -> Any:
        if name not in self.content:
            raise DataError(
                f"{self.place} has no field {name!r} (it has {', '.join(self.content) or 'none'}); it is of another format."
            )
        return self.content[name]

    def _odd(self, name: str, value: Any, wanted: str) -> DataError:
        shown = repr(value)
        return DataError(f"{self.place}: {name!r} is {shown[:60]}; it has to be {wanted}.")


def entries(value: Any, place: str) -> list[Entry]:
    """Return the objects of a JSON list.

    Raises:
        DataError: It is not a list, or holds something other than objects.
    """
    if not isinstance(value, list):
        raise DataError(f"{place} holds {type(value).__name__}, not a list.")
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"{place}, entry {number}, holds {type(item).__name__}, not an object.")
    return [Entry(item, f"{place}, entry {number}") for number, item in enumerate(value)]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or the list of values of a file with one JSON value on each line.

    Raises:
        DataError: The file is missing, empty, or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give an annotation file.") from error
    try:
        return json.loads(text)
    except ValueError as whole:
        try:
            lines = list(_json_lines(text))
        except ValueError as error:
            raise DataError(
                f"{path} is neither JSON ({whole}) nor a file with one JSON value on each line ({error}); copy it again."
            ) from error
        if not lines:
            raise DataError(f"{path} is empty; copy it again.") from whole
        return lines


def _json_lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error


def find_annotations(owner: str, root: Path, names: Sequence[str]) -> Path:
    """Return the first of the files that lies in the root, or in a folder of annotations below it.

    Raises:
        DataError: There is none.
    """
    if not root.is_dir():
        raise DataError(f"{owner}: {root} is not a folder; give the folder that holds annotations and images.")
    for name in names:
        for folder in ANNOTATION_FOLDERS:
            path = root / folder / name
            if path.is_file():
                return path
    raise DataError(
        f"{owner}: {root} holds none of {', '.join(names)}, nor does a folder 'annotations' in it; put one there, or name the "
        "file by `annotations`."
    )


@dataclass(frozen=True)
class ImageFolder:
    """Opens images below a folder, or below one of its folders of the given names."""

    root: Path
    below: tuple[str, ...] = (".", "images")

    def path(self, name: str) -> Path:
        """The file of an image.

        Raises:
            DataError: There is no such file, or it lies outside the folder.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"the image {name!r} lies outside {self.root}; names of images are relative to it.")
        tried = [self.root / folder / name for folder in self.below]
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise DataError(
                f"there is no image {' or '.join(map(str, tried))}; the images of the data set are not complete."
            )
        return path

    def __call__(self, name: str) -> Image.Image:
        """The image in RGB.

        Raises:
            DataError: There is no such file, it lies outside the folder, or it is damaged.
        """
        path = self.path(name)
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} is damaged or not an image ({error}); copy it again.") from error
