"""Files and folders that are written whole or not at all.

Start at :func:`replacing_file`. What is written goes to a draft: a hidden neighbour of the target under a name of its own, so
that two writers never share one. A complete draft is flushed to the disk and renamed to the target, and the folder that holds
the name is flushed, too. If writing fails, the draft is removed and the target stays as it was; a process that is killed leaves
its draft behind, but never half a target. :func:`write_failures` is how a full disk and the like become errors for people.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from madtp.errors import UnwritableError

_ROOM = "free space there or choose another place"
_RIGHTS = "choose a place that you may write to"
_TAKEN = "choose another name"
ADVICE: Mapping[int, str] = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EEXIST: _TAKEN,
    errno.EISDIR: _TAKEN,
    errno.ENOTDIR: _TAKEN,
    errno.EIO: "check the disk, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What to do about failures of the system that say by their number that something cannot be written."""

# safetensors raises errors of its own, which hold the number of the system's in their text.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
# Names of our drafts, and of those in which safetensors writes them.
_DRAFT = re.compile(r"\..+\.[0-9a-f]{12}(\.[^.]+)?|\.tmp\w{6}", re.DOTALL)
# Letters of the target's name in that of its draft, which has to be short enough, too.
_STEM = 40


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A name to write a draft of ``path`` under; whatever still has that name when the block ends is removed.

    For files whose final name depends on their content. :func:`publish` gives a draft its final name.

    Args:
        path: the target. Its folder is created, and removed again if nothing is in it when the block ends. The draft lies in
            it and keeps the suffix of ``path``.

    Yields:
        A path at which nothing exists yet.
    """
    created = _create_folder(path.parent)
    draft = path.with_name(f"{_prefix(path)}{uuid4().hex[:12]}{path.suffix}")
    try:
        yield draft
    finally:
        _remove(draft)
        _remove_empty(created)


def publish(draft: Path, path: Path) -> None:
    """Flush the file ``draft`` to the disk and rename it to ``path``, in place of a file that is there."""
    _open_to_others(draft)
    _flush(draft)
    os.replace(draft, path)
    _flush_folder(path.parent)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Write the file ``path`` by a draft that takes its place when the block ends without an error.

    Args:
        path: the target. Its folder is created.

    Yields:
        The path to write to.

    Raises:
        UnwritableError: see :func:`write_failures`.
    """
    with write_failures(path), draft_of(path) as draft:
        _refuse_others(path)
        yield draft
        publish(draft, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        UnwritableError: see :func:`write_failures`.
    """
    with replacing_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Fill the folder ``path`` by a draft that takes its place when the block ends without an error.

    A folder cannot be renamed over one that holds files, so one that is there is first moved out of the way. It is moved back
    if the draft cannot take its place, and removed otherwise. In between, nothing has the name for an instant.

    Args:
        path: the target. Its parent folders are created.

    Yields:
        An empty folder to write into.

    Raises:
        UnwritableError: see :func:`write_failures`.
    """
    with write_failures(path), draft_of(path) as draft:
        draft.mkdir()
        yield draft
        for file in list(draft.rglob("*")):
            if file.is_dir():
                _flush_folder(file)
            else:
                _open_to_others(file)
                _flush(file)
        _flush_folder(draft)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        _take_place(draft, path)
        _flush_folder(path.parent)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts in a folder that writers have left which were killed. Nobody else may be writing there."""
    for path in folder.glob(".*"):
        if _DRAFT.fullmatch(path.name):
            _remove(path)


def remove_folder(path: Path) -> None:
    """Remove a folder in one step: nobody finds a part of it under its name.

    Raises:
        UnwritableError: see :func:`write_failures`.
    """
    with write_failures(path), draft_of(path) as gone:
        path.rename(gone)


@contextmanager
def write_failures(path: Path) -> Iterator[None]:
    """Turn failures of the system to write ``path`` inside the block into errors that say what to do.

    Raises:
        UnwritableError: there is no room, no right to write, or something else has the name.
    """
    try:
        yield
    except UnwritableError:
        raise
    except (OSError, SafetensorError) as error:
        if not is_write_failure(error, path):
            raise
        raise _unwritable(path, error) from error


def is_write_failure(error: BaseException, path: Path) -> bool:
    """Return whether an error says that ``path``, or a draft of it, cannot be written. Errors of other files do not."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str | os.PathLike):
        return _number(error) in ADVICE
    file, target = Path(named).absolute(), path.absolute()
    if target.is_relative_to(file) or file.is_relative_to(target):
        return True
    return file.is_relative_to(target.parent) and file.relative_to(target.parent).parts[0].startswith(_prefix(path))


def check_writable(path: Path) -> None:
    """Find out whether a file can be written, before the work is done that is to fill it.

    Raises:
        UnwritableError: it cannot; the message says why.
    """
    with write_failures(path):
        _refuse_others(path)
    _check_folder(path.parent, path)


def check_writable_folder(path: Path) -> None:
    """Do as :func:`check_writable` for a folder that is there or will be created.

    Raises:
        UnwritableError: nothing can be written there; the message says why.
    """
    _check_folder(path, path)


def _refuse_others(path: Path) -> None:
    """Refuse to put a file in place of a folder, a device or a pipe."""
    if path.exists() and not path.is_file():
        number = errno.EISDIR if path.is_dir() else errno.EEXIST
        raise OSError(number, os.strerror(number), str(path))


def _check_folder(folder: Path, target: Path) -> None:
    try:
        nearest = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(path: Path, error: BaseException) -> UnwritableError:
    number = _number(error)
    reason = os.strerror(number) if number else str(error)
    if number in (errno.ENOTDIR, errno.EEXIST):
        reason = next((f"{one} is a file" for one in (path, *path.parents) if one.is_file()), reason)
    return UnwritableError(f"{path} cannot be written ({reason}); {ADVICE.get(number, 'choose another place')}.")


def _number(error: BaseException) -> int:
    """The number that the system gives to an error; 0 if there is none."""
    if isinstance(error, SafetensorError):
        found = _SYSTEM_ERROR.search(str(error))
        return int(found[1]) if found else 0
    return getattr(error, "errno", None) or 0


def _prefix(path: Path) -> str:
    return f".{path.stem[:_STEM]}."


def _take_place(draft: Path, path: Path) -> None:
    """Rename a folder to ``path``, where one may be."""
    try:
        draft.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        with draft_of(path) as old:
            try:
                with suppress(FileNotFoundError):  # another writer has moved it
                    path.rename(old)
                _take_place(draft, path)
            except BaseException:
                if old.exists() and not path.exists():
                    old.rename(path)
                raise


def _create_folder(folder: Path) -> list[Path]:
    """Create a folder with those above it, and return those that were missing, the innermost first."""
    missing = list(takewhile(lambda one: not one.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one in missing:
            _flush_folder(one.parent)
    except BaseException:
        _remove_empty(missing)
        raise
    return missing


def _open_to_others(file: Path) -> None:
    """Give a file the rights of any new one here: safetensors makes its files private to their owner."""
    if os.name != "posix" or file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return
    with draft_of(file) as other:
        other.touch()
        file.chmod(stat.S_IMODE(other.stat().st_mode))


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder last, where the system knows how to."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # A folder may be writable and not readable, and some file systems cannot flush one.
        if error.errno not in (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP):
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # something is in it
            folder.rmdir()
