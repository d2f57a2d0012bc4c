"""Reads annotation files, with an error for everything that is damaged or of another format.

Start at :func:`read_json`, :func:`entries` and :class:`Entry`. Messages name the file, and the entry or the line in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madtp.errors import DataError
from madtp.files.json_text import parse_json, read_text
from madtp.files.limits import LARGEST_ANNOTATIONS, shown
from zoo.datasets.records import R

ANNOTATION_FOLDERS = (".", "annotations", "annotation")


@dataclass(frozen=True)
class Entry:
    """One entry of an annotation file, with the place that messages name. Its fields are read by type."""

    content: dict[str, Any]
    place: str

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self._get(name)
        if not _is_text(value):
            raise self._odd(name, value, "some text")
        return str(value)

    def name(self, name: str) -> str:
        """A string or whole number, as a string."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self._odd(name, value, "a number or name")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings with at least one in it, or a string that stands for itself; none of them is blank."""
        value = self._get(name)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed:
            raise self._odd(name, value, "text or a list of texts")
        for number, text in enumerate(listed):
            if not _is_text(text):
                place = name if isinstance(value, str) else f"{name}[{number}]"
                raise self._odd(place, text, "some text")
        return tuple(listed)

    def entries(self, name: str) -> list[Entry]:
        """A list of entries."""
        return entries(self._get(name), f"{self.place}, {name!r}")

    def is_list(self, name: str) -> bool:
        """Whether a field holds a list."""
        return isinstance(self._get(name), list)

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
        return DataError(f"{self.place}: {name!r} is {shown(value)}; it has to be {wanted}.")


class JsonLines(list[Any]):
    """The values of a file with one JSON value on each line.

    Attributes:
        lines: the number of the line of each.
    """

    def __init__(self, numbered: Iterable[tuple[int, Any]]) -> None:
        pairs = list(numbered)
        super().__init__(value for _, value in pairs)
        self.lines = [number for number, _ in pairs]


def entries(value: Any, place: str) -> list[Entry]:
    """Return the objects of a JSON list.

    Raises:
        DataError: It is not a list, or holds something other than objects.
    """
    if not isinstance(value, list):
        raise DataError(f"{place} holds {type(value).__name__}, not a list.")
    listed = []
    for number, item in enumerate(value):
        where = f"line {value.lines[number]}" if isinstance(value, JsonLines) else f"entry {number}"
        if not isinstance(item, dict):
            raise DataError(f"{place}, {where}, holds {type(item).__name__}, not an object.")
        listed.append(Entry(item, f"{place}, {where}"))
    return listed


def named_once(records: Sequence[R], listed: Sequence[Entry]) -> list[R]:
    """Return the records of entries, in their order.

    Raises:
        DataError: Two have one name; the message says where both are.
    """
    places: dict[str, str] = {}
    for record, entry in zip(records, listed, strict=True):
        if places.setdefault(record.id, entry.place) != entry.place:
            raise DataError(f"{entry.place} is {record.id!r} once more, after {places[record.id]}; remove one of them.")
    return list(records)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or the list of values of a file with one JSON value on each line.

    Raises:
        DataError: The file is missing, empty, or not JSON.
    """
    try:
        text = read_text(path, LARGEST_ANNOTATIONS)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); give an annotation file.") from error
    try:
        return parse_json(text)
    except ValueError as whole:
        try:
            lines = JsonLines(_json_lines(text))
        except ValueError as error:
            raise DataError(
                f"{path} is neither JSON ({whole}) nor a file with one JSON value on each line ({error}); copy it again."
            ) from error
        if not lines:
            raise DataError(f"{path} is empty; copy it again.") from whole
        return lines


def _is_text(value: object) -> bool:
    """Whether a value is a string that is not blank, of whole characters."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
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
