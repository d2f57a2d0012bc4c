"""Names of data sets: :func:`data` opens one, :func:`list_data` lists them, :func:`register_data` adds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madtp.errors import ConfigError, DataError
from zoo.datasets.records import DataSet, ImageSource, Record, Transform
from zoo.named import SNAKE_CASE, Registry

TASKS = ("reasoning", "captioning", "retrieval", "questions")


@dataclass(frozen=True)
class Request:
    """What is asked of a data set.

    Attributes:
        name: Of the data set.
        split: Of the data set.
        root: The folder that holds it; None for data made by rule.
        annotations: A file to read instead of the one in ``root``.
        limit: The largest number of samples; data made by rule has as many.
        seed: The edition of data made by rule.
    """

    name: str
    split: str
    root: Path | None
    annotations: Path | None
    limit: int | None
    seed: int

    def folder(self) -> Path:
        """Return ``root``.

        Raises:
            DataError: It was not given.
        """
        if self.root is None:
            raise DataError(f"{self.name} lies in files; give the folder that holds annotations and images as `root`.")
        return self.root


Opener = Callable[[Request], tuple[list[Any], ImageSource]]
"""Reads the records of a split; returns them, and a function that opens their images."""


@dataclass(frozen=True)
class DataEntry:
    """What the zoo knows of one data set.

    Attributes:
        name: What :func:`data` calls it.
        opener: Reads a split.
        description: A line for people.
        tasks: Those of :data:`TASKS` that it serves.
        splits: Names of its splits.
        made_by_rule: Whether samples are drawn rather than read from files.
    """

    name: str
    opener: Opener
    description: str
    tasks: tuple[str, ...]
    splits: tuple[str, ...]
    made_by_rule: bool = False


DATA: Registry[DataEntry] = Registry(
    "data set", names=SNAKE_CASE, advice="use lower-case words and digits joined by '_'", unknown=DataError
)


def register_data(entry: DataEntry) -> None:
    """Put a data set into the zoo.

    Args:
        entry: Its name, tasks, splits, and the function that reads it.

    Raises:
        ConfigError: The name is taken or malformed, or a task is not known.
    """
    if not entry.tasks or any(task not in TASKS for task in entry.tasks):
        raise ConfigError(f"The data set '{entry.name}' is for {entry.tasks}; tasks are {', '.join(TASKS)}.")
    DATA.add(entry.name, entry)


def list_data(pattern: str = "") -> list[str]:
    """Return the names that match a shell-style pattern, sorted; all of them for an empty pattern."""
    return DATA.matching(pattern)


def describe_data(name: str) -> DataEntry:
    """Return the entry of a data set.

    Raises:
        DataError: No such name; the message lists near matches.
    """
    return DATA.find(name)


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
        name: A name from :func:`list_data`.
        root: The folder with annotations and images; left out for data made by rule.
        split: A split of the data set.
        transform: Makes the model's input from an RGB image (see :mod:`zoo.transforms`); None gives pixels, uint8.
        annotations: A file to read instead of the usual one in ``root``.
        limit: The largest number of samples, taken from the start.
        seed: The edition of data made by rule.

    Raises:
        DataError: The name or split is not known, or a file is missing, damaged or of another format. A damaged image
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
