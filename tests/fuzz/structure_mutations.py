"""Mutations of a folder: which files are there, under which names, and of which kind. See :data:`STRUCTURE`."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .kinds import CHOICE, Kind

NAMES = (
    "a",
    "config.json",
    "model.safetensors",
    "step-00000009",
    ".hidden",
    "b" * 200,
    "é",
    "x.json",
    "model.safetensors.index.json",
)
LINKS = (".", "..", "nothing", os.devnull)
"""What a link leads to besides itself and other files of the folder."""


@dataclass(frozen=True)
class RemoveFile:
    def on(self, path: Path, others: list[Path]) -> None:
        path.unlink()


@dataclass(frozen=True)
class EmptyFile:
    def on(self, path: Path, others: list[Path]) -> None:
        path.write_bytes(b"")


@dataclass(frozen=True)
class RenameFile:
    name: int

    def on(self, path: Path, others: list[Path]) -> None:
        path.rename(path.with_name(NAMES[self.name % len(NAMES)]))


@dataclass(frozen=True)
class MakeFolder:
    """A folder in the place of a file, which holds the file."""

    def on(self, path: Path, others: list[Path]) -> None:
        content = path.read_bytes()
        path.unlink()
        path.mkdir()
        (path / path.name).write_bytes(content)


@dataclass(frozen=True)
class MakeLink:
    """A link in the place of a file."""

    target: int

    def on(self, path: Path, others: list[Path]) -> None:
        path.unlink()
        known = (path.name, *LINKS, *map(str, others))
        path.symlink_to(known[self.target % len(known)])


@dataclass(frozen=True)
class SwapFiles:
    other: int

    def on(self, path: Path, others: list[Path]) -> None:
        if others:
            other = others[self.other % len(others)]
            one, two = path.read_bytes(), other.read_bytes()
            path.write_bytes(two)
            other.write_bytes(one)


@dataclass(frozen=True)
class CopyFile:
    """A file under another name too, or in the place of another file."""

    name: int

    def on(self, path: Path, others: list[Path]) -> None:
        known = (*(path.with_name(name) for name in NAMES), *others)
        shutil.copyfile(path, known[self.name % len(known)])


@dataclass(frozen=True)
class RemoveParent:
    """Without the folder that the file lies in."""

    def on(self, path: Path, others: list[Path]) -> None:
        shutil.rmtree(path.parent)


StructureMutation = RemoveFile | EmptyFile | RenameFile | MakeFolder | MakeLink | SwapFiles | CopyFile | RemoveParent

STRUCTURE = (
    Kind(RemoveFile),
    Kind(EmptyFile),
    Kind(RenameFile, (CHOICE,)),
    Kind(MakeFolder),
    Kind(MakeLink, (CHOICE,)),
    Kind(SwapFiles, (CHOICE,)),
    Kind(CopyFile, (CHOICE,)),
    Kind(RemoveParent),
)


def restructure(mutation: StructureMutation, path: Path, files: list[Path]) -> None:
    """Apply a mutation to a file, where earlier ones have left it as a file, and the system can do it."""
    if path.is_file() and not path.is_symlink():
        others = [other for other in files if other != path and other.is_file() and not other.is_symlink()]
        with suppress(OSError):
            mutation.on(path, others)
