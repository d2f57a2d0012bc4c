"""Declarative tables that map the keys of a checkpoint file to those of a model. Start with :class:`KeyTable`.

A model class lists the formats that it reads as ``checkpoint_tables``; the first whose ``mark`` a file holds is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from madtp.errors import CheckpointError


@dataclass(frozen=True)
class Row:
    """A key of a file and the key of the model that it becomes. A ``*`` stands for any text, which is kept.

    Attributes:
        theirs: The key in the file; several are concatenated along the first dimension.
        ours: The key of the model.
        transpose: Whether to swap the two dimensions of a matrix.
    """

    theirs: str | tuple[str, ...]
    ours: str
    transpose: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """``theirs`` as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


@dataclass(frozen=True)
class KeyTable:
    """How the keys of one format map to a model. Patterns are shell-style.

    Attributes:
        name: The format, for reports.
        mark: A key that files of this format hold and those of later tables do not; "*" takes every file.
        rows: The first that matches a key is applied; keys that match none keep their name.
        ignored: Keys that a file may hold and the model does not use.
        optional: Keys of the model that a file may lack.
        position_grids: Position embeddings ``[1, 1 + side * side, C]`` or ``[1 + side * side, C]`` (class token first), by the
            model's names, that are resized when the side differs.
    """

    name: str = "published"
    mark: str = "*"
    rows: tuple[Row, ...] = ()
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("madtp.*",)
    position_grids: tuple[str, ...] = ()


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key fits one of the shell-style patterns."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def choose(tables: Iterable[KeyTable], found: Iterable[str]) -> KeyTable:
    """Return the table of the format that a file with these keys has, or an empty table where none fits."""
    keys = list(found)
    return next((table for table in tables if any(fnmatchcase(key, table.mark) for key in keys)), KeyTable())


def translate(found: Mapping[str, Tensor], table: KeyTable) -> dict[str, Tensor]:
    """Return the tensors of a file under the model's names, without those that the table ignores.

    Raises:
        CheckpointError: Two keys want the same name, or parts of a concatenation are missing.
    """
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    rows: dict[str, Row | None] = {}
    for key, value in found.items():
        if matches(key, table.ignored):
            continue
        name, place, row = _apply(key, table.rows)
        taken = parts.setdefault(name, {})
        if place in taken:
            raise CheckpointError(f"the file holds {taken[place][0]} and {key}, which both belong to {name}.")
        taken[place] = key, value
        rows[name] = row
    return {name: _assemble(name, taken, rows[name]) for name, taken in parts.items()}


def _apply(key: str, rows: Iterable[Row]) -> tuple[str, int, Row | None]:
    """The model's name of a key, which part of the tensor it is, and the row that says so."""
    for row in rows:
        for place, source in enumerate(row.sources):
            match = re.fullmatch(re.escape(source).replace(r"\*", "(.*)"), key)
            if match:
                name = row.ours
                for kept in match.groups():
                    name = name.replace("*", kept, 1)
                return name, place, row
    return key, 0, None


def _assemble(name: str, taken: Mapping[int, tuple[str, Tensor]], row: Row | None) -> Tensor:
    if row is None:
        return taken[0][1]
    absent = [source for place, source in enumerate(row.sources) if place not in taken]
    if absent:
        raise CheckpointError(
            f"the file holds {', '.join(key for key, _ in taken.values())}, but not all of {', '.join(row.sources)}, which "
            f"make {name} together."
        )
    values = [taken[place][1] for place in range(len(row.sources))]
    sizes = {(value.shape[1:], value.dtype) for value in values}
    if len(sizes) > 1 or (len(values) > 1 and not all(value.dim() for value in values)):
        raise CheckpointError(f"the parts of {name} ({', '.join(row.sources)}) differ in their sizes or types.")
    value = values[0] if len(values) == 1 else torch.cat(values)
    return value.T if row.transpose and value.dim() == 2 else value
