"""Results of an unfinished evaluation, stored in a folder: :class:`PartialResults`.

The results of each batch are one JSON file, written under another name and renamed when complete. ``setup.json`` says which
evaluation they belong to, so that those of another are never mixed in. Every file tells its name and the hash of its content
and of the setup, so that one that was changed, swapped or copied from elsewhere is told.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from madtp.atomic_files import write_text
from madtp.errors import CheckpointError
from madtp.files.json_text import read_description
from madtp.files.limits import LARGEST_ANNOTATIONS
from madtp.saving.differences import differences

SETUP = "setup.json"


class PartialResults:
    """Results of the batches of one evaluation, by name.

    Args:
        folder: created with the first result. A folder that exists must belong to the same evaluation, or hold nothing but
            drafts of one that was killed before its first result.
        setup: everything that the results depend on, in JSON values.

    Raises:
        CheckpointError: if the folder belongs to something else.
    """

    def __init__(self, folder: Path, setup: Mapping[str, object]) -> None:
        self.folder = folder
        self.setup: dict[str, object] = json.loads(json.dumps(setup))
        self._owner = _hash(json.dumps(self.setup, sort_keys=True))
        if (folder / SETUP).is_file():
            stored = _read(folder / SETUP, f"remove {folder} to evaluate all batches again")
            if different := differences(stored, self.setup):
                raise CheckpointError(
                    f"{folder} holds parts of another evaluation: {different}; remove it or choose another output."
                )
        elif folder.exists() and (not folder.is_dir() or any(not _is_draft(path) for path in folder.iterdir())):
            raise CheckpointError(f"{folder} is not a folder of an evaluation; choose another output.")

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a stored result, or ``None``.

        Raises:
            CheckpointError: if its file is damaged, or is that of another result.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        stored = _read(path, AGAIN)
        content = stored.get("content")
        if stored.get("name") != name or stored.get("setup") != self._owner:
            raise CheckpointError(f"{path} holds another result than its name says; {AGAIN}.")
        if not isinstance(content, dict) or stored.get("hash") != _hash(json.dumps(content)):
            raise CheckpointError(f"{path} is damaged (its content does not match its hash); {AGAIN}.")
        return content

    def put(self, name: str, content: Mapping[str, object]) -> None:
        """Store a result.

        Raises:
            CheckpointError: if it cannot be written, or holds NaN.
        """
        if not (self.folder / SETUP).is_file():
            write_json(self.folder / SETUP, self.setup)
        head = {"name": name, "setup": self._owner, "hash": _hash(json.dumps(content))}
        write_json(self.path(name), {**head, "content": content})

    def path(self, name: str) -> Path:
        """Return the file of a result."""
        return self.folder / f"{name}.json"

    def remove(self) -> None:
        """Delete the files, once the evaluation is complete, and the folder unless it holds a folder of someone else's."""
        if not self.folder.exists():
            return
        # The setup goes last: without it, the folder would be nobody's if the process were killed here.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == SETUP):
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


AGAIN = "remove it, and its batch is evaluated again"
"""What to do about the file of a result."""


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file completely or not at all.

    Raises:
        CheckpointError: if it cannot be written, or holds NaN.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError as error:
        raise CheckpointError(
            f"{path} would hold NaN or an infinite number ({error}); check the weights for NaN."
        ) from error
    write_text(path, text + "\n")


def _read(path: Path, advice: str) -> dict[str, Any]:
    try:
        content = read_description(path, LARGEST_ANNOTATIONS)  # a batch has as many results as samples
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {advice}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds {type(content).__name__}); {advice}.")
    return content


def _hash(text: str) -> str:
    # JSON has one form for each number, so the text of what was read is that of what was written.
    return hashlib.sha256(text.encode()).hexdigest()


def _is_draft(path: Path) -> bool:
    """Whether a file is what a process that was killed left of its first write."""
    return path.is_file() and path.name.startswith(f".{Path(SETUP).stem}.")
