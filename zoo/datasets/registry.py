"""Names of data sets: :func:`data` opens one, :func:`list_data` lists them, :func:`register_data` adds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from madtp.errors import ConfigError, DataError
from zoo.datasets.records import DataSet, ImageSource, Record, Transform
from zoo.suggestions import did_you_mean

TASKS = ("reasoning", "captioning", "retrieval", "questions")


@dataclass(frozen=True)
class Request:
    """What is asked of a data set.

    Attributes:
        name, split: of the data set.
        root: folder that holds it, None where it is made by rule.
        annotations: file to read in place of the one that lies in `root`.
        limit: number of samples at most; what is made by rule has as many.
        seed: which edition, of data made by rule.
    """

    name: str
    split: str
    root: Path | None
    annotations: Path | None
    limit: int | None
    seed: int

    def folder(self) -> Path:
        """`root`, which has to be given."""
        if self.root is None:
            raise DataError(f"{self.name} lies in files; give the folder that holds annotations and images as `root`.")
        return self.root


Opener = Callable[[Request], tuple[list[Any], ImageSource]]
"""Reads the records of a split, and says what opens their images."""


@dataclass(frozen=True)
class DataEntry:
    """What the zoo knows of one data set; `tasks` are those of :data:`TASKS` that it serves."""

    name: str
    opener: Opener
    description: str
    tasks: tuple[str, ...]
    splits: tuple[str, ...]
    made_by_rule: bool = False


_entries: dict[str, DataEntry] = {}


def register_data(entry: DataEntry) -> None:
    """Put a data set into the zoo.

    Raises:
        ConfigError: the name is taken, or a task is not known.
    """
    if entry.name in _entries:
        raise ConfigError(f"Data set '{entry.name}' is registered already; choose another name.")
    if not entry.tasks or any(task not in TASKS for task in entry.tasks):
        raise ConfigError(f"Data set '{entry.name}' is for {entry.tasks}; tasks are {', '.join(TASKS)}.")
    _entries[entry.name] = entry


def list_data(pattern: str = "") -> list[str]:
    """Names that match the shell-style `pattern` (all when empty), sorted."""
    return sorted(name for name in _entries if not pattern or fnmatchcase(name, pattern))


def describe_data(name: str) -> DataEntry:
    """The entry of a data set.

    Raises:
        DataError: no such name; the message lists near matches.
    """
    if name in _entries:
        return _entries[name]
    advice = did_you_mean(name, _entries, otherwise=f"Known: {', '.join(list_data())}.")
    raise DataError(f"The zoo has no data set {name!r}. {advice}")


def data(
    name: str,
    root: str | Path | None = None,
    split: str = "test",
    *,
    transform: Transform | None = None,
    annotations: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> DataSet[Record]:
    """Open one split of a data set.

    Args:
        name: a name from :func:`list_data`.
        root: the folder with annotations and images; left out for data made by rule.
        split: one that the data set has.
        transform: makes of an RGB image what the model takes (see :mod:`zoo.transforms`); None keeps pixels, uint8.
        annotations: file to read in place of the usual one in `root`.
        limit: how many samples at most, from the start.
        seed: edition, of data made by rule.

    Raises:
        DataError: the name or split is not known, or a file is missing, damaged or of another format. A damaged image
            raises it when it is opened; nothing is ever skipped.
    """
    entry = describe_data(name)
    if split not in entry.splits:
        raise DataError(f"{name} has no split {split!r}; choose one of {', '.join(entry.splits)}.")
    if limit is not None and limit < 1:
        raise DataError(f"{name}: limit is {limit}; it has to be at least 1.")
    if entry.made_by_rule and (root is not None or annotations is not None):
        raise DataError(f"{name} is made by rule and lies in no files; leave root and annotations out.")
    if seed and not entry.made_by_rule:
        raise DataError(f"{name} has one edition; seed is for data made by rule.")
    request = Request(
        name,
        split,
        None if root is None else Path(root),
        None if annotations is None else Path(annotations),
        limit,
        seed,
    )
    records, source = entry.opener(request)
    return DataSet(name, split, records if limit is None else records[:limit], source, transform)
