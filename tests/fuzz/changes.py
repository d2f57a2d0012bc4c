"""What is done to a valid input: :class:`Attempt`, drawn by :func:`attempts` (hypothesis) or :func:`drawn_attempt` (a seed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st

from .archive_mutations import ARCHIVE
from .bytes_mutations import BYTES, ContentMutation
from .json_mutations import JSON, InHeader, InJson, InLine
from .kinds import CHOICE, Kind, drawn, strategy
from .structure_mutations import STRUCTURE, StructureMutation, restructure
from .tensor_mutations import TENSORS
from .text_mutations import LINES

MOST_CHANGES = 4

FORMATS: Mapping[str, tuple[tuple[Kind, ...], ...]] = {
    "json": ((Kind(InJson, (), JSON),), (Kind(InJson, (), JSON),), BYTES, STRUCTURE),
    "json lines": ((Kind(InLine, (CHOICE,), JSON),), (Kind(InLine, (CHOICE,), JSON),), LINES, BYTES, STRUCTURE),
    "safetensors": ((Kind(InHeader, (), JSON),), TENSORS, BYTES, STRUCTURE),
    "archive": (ARCHIVE, ARCHIVE, TENSORS, BYTES, STRUCTURE),
    "pickle": (BYTES, BYTES, TENSORS, STRUCTURE),
    "lines": (LINES, LINES, BYTES, STRUCTURE),
    "bytes": (BYTES, BYTES, BYTES, BYTES, STRUCTURE),
}
"""Tables of mutations by the format of a file; each table is as likely as the others."""


@dataclass(frozen=True)
class Change:
    """A mutation of one file.

    Attributes:
        file: which, by its place in the list of the files of the input.
        mutation: what is done to it.
    """

    file: int
    mutation: ContentMutation | StructureMutation


@dataclass(frozen=True)
class Attempt:
    """What is done to an input.

    Attributes:
        changes: one after the other.
        sealed: whether hashes that the input holds are made right again, as someone would who wants it to be read.
    """

    changes: tuple[Change, ...]
    sealed: bool


def apply(attempt: Attempt, files: Sequence[Path]) -> None:
    """Change the files of an input."""
    for change in attempt.changes:
        path = files[change.file]
        if isinstance(change.mutation, StructureMutation):
            restructure(change.mutation, path, list(files))
        elif path.is_file() and not path.is_symlink():
            other = files[(change.file + 1) % len(files)]
            content = path.read_bytes()
            source = other.read_bytes() if other.is_file() else content
            path.write_bytes(change.mutation.of(content, source))


@cache
def attempts(formats: tuple[str, ...]) -> st.SearchStrategy[Attempt]:
    """Return the strategy of attempts on an input.

    Args:
        formats: names in :data:`FORMATS`, of each file.
    """
    change: st.SearchStrategy[Any] = st.one_of(
        st.builds(Change, st.just(file), strategy(table))
        for file, name in enumerate(formats)
        for table in FORMATS[name]
    )
    several = st.lists(change, min_size=1, max_size=MOST_CHANGES).map(tuple)
    return st.builds(Attempt, several, st.booleans())


def drawn_attempt(formats: Sequence[str], seed: str) -> Attempt:
    """Draw an attempt; the same seed gives the same one."""
    random = Random(seed)
    changes = []
    for _ in range(1 + min(random.randrange(MOST_CHANGES), random.randrange(MOST_CHANGES))):
        file = random.randrange(len(formats))
        changes.append(Change(file, drawn(random.choice(FORMATS[formats[file]]), random)))
    return Attempt(tuple(changes), bool(random.randrange(2)))
