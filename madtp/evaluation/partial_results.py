"""Results of an unfinished evaluation, stored in a folder: :class:`PartialResults`.

The results of each batch are one JSON file, written under another name and renamed when complete. ``setup.json`` says which
evaluation they belong to, so that those of another are never mixed in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madtp.atomic_files import write_text
from madtp.errors import CheckpointError

SETUP = "setup.json"


class PartialResults:
    """Results of the batches of one evaluation, by name.

    Args:
        folder: created with the first result. A folder that exists must belong to the same evaluation.
        setup: everything that the results depend on, in JSON values.

    Raises:
        CheckpointError: if the folder belongs to something else.
    """

    def __init__(self, folder: Path, setup: Mapping[str, object]) -> None:
        self.folder = folder
        self.setup: dict[str, object] = json.loads(json.dumps(setup))
        if (folder / SETUP).is_file():
            stored = _read(folder / SETUP)
            different = sorted(name for name in {*stored, *self.setup} if stored.get(name) != self.setup.get(name))
            if different:
                first = different[0]
                raise CheckpointError(
                    f"{folder} holds parts of another evaluation ({', '.join(different)} differ: {stored.get(first)!r} "
                    f"there, {self.setup.get(first)!r} here); remove it or choose another output."
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} is not a folder of an evaluation; choose another output.")

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a stored result, or ``None``."""
        path = self.folder / f"{name}.json"
        return _read(path) if path.is_file() else None

    def put(self, name: str, content: Mapping[str, object]) -> None:
        """Store a result.

        Raises:
            CheckpointError: if it cannot be written, or holds NaN.
        """
        if not (self.folder / SETUP).is_file():
            write_json(self.folder / SETUP, self.setup)
        write_json(self.folder / f"{name}.json", content)

    def remove(self) -> None:
        """Delete the folder, once the evaluation is complete."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, and its batch is evaluated again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds {type(content).__name__}); remove it.")
    return content
