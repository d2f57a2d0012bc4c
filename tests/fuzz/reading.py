"""What a reader is: :class:`Reader` makes a small valid input, and a :class:`Case` reads it after it has been changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """An input of a reader, and how it is read.

    Attributes:
        files: names of the files to change, relative to the folder of the input, with their formats in
            :data:`~.changes.FORMATS`.
        read: reads the input in a folder; returns what it holds, or raises a ``MadtpError``.
        check: takes what was read, and whether it was sealed; raises :class:`WrongError` if it is not correct.
        state: tensors that reading may change, but not where it is refused.
        seal: makes the hashes right that the input in a folder holds.
    """

    files: tuple[tuple[str, str], ...]
    read: Callable[[Path], Any]
    check: Callable[[Any, bool], None]
    state: Callable[[], Mapping[str, Tensor]] = dict
    seal: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        name: for the command.
        about: what it reads, in a line.
        open: writes a valid input into an empty folder, and returns the case.
    """

    name: str
    about: str
    open: Callable[[Path], Case]


class WrongError(AssertionError):
    """Something was loaded that should not have been, or not like this."""


def expect(holds: bool, what: str) -> None:
    """Raise :class:`WrongError` unless something holds."""
    if not holds:
        raise WrongError(what)
