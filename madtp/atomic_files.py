"""Files and folders that are written whole or not at all.

Start at :func:`replacing_file`. What is written goes to a draft: a hidden neighbour of the target under a name of its own, so
that two writers never share one. A complete draft is flushed to the disk and renamed to the target. If writing fails, the
draft is removed and the target stays as it was; a process that is killed leaves its draft behind, but never half a target.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from madtp.errors import DataError


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A name to write a draft of ``path`` under; whatever still has that name when the block ends is removed.

    For files whose final name depends on their content. :func:`publish` gives a draft its final name.

    Args:
        path: the target. Its folder is created; the draft lies in it and keeps the suffix of ``path``.

    Yields:
        A path at which nothing exists yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{uuid4().hex[:12]}{path.suffix}")
    try:
        yield draft
    finally:
        _remove(draft)


def publish(draft: Path, path: Path) -> None:
    """Flush the file ``draft`` to the disk and rename it to ``path``, in place of a file that is there."""
    _flush(draft)
    os.replace(draft, path)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Write the file ``path`` by a draft that takes its place when the block ends without an error.

    Args:
        path: the target. Its folder is created.

    Yields:
        The path to write to.
    """
    with draft_of(path) as draft:
        yield draft
        publish(draft, path)


def check_writable(path: Path) -> None:
    """Find out whether a file can be written, before the work is done that is to fill it.

    Raises:
        DataError: it cannot; the message says why.
    """
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); choose another file.") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Fill the folder ``path`` by a draft that takes its place when the block ends without an error.

    A folder cannot be renamed over one that holds files, so one that is there is first moved out of the way. It is moved back
    if the draft cannot take its place, and removed otherwise.

    Args:
        path: the target. Its parent folders are created.

    Yields:
        An empty folder to write into.
    """
    with draft_of(path) as draft, draft_of(path) as old:
        draft.mkdir()
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            path.rename(old)
        try:
            draft.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
