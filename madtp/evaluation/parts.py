"""Results of an evaluation that is under way, kept in a folder: :class:`Parts`.

Each batch is a JSON file, written under another name and renamed when complete. `setup.json` says what the results belong
to, so that those of another evaluation are never mixed in.
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


class Parts:
    """Parts of one evaluation.

    Args:
        folder: is created with the first part; one that is there has to belong to the same evaluation.
        setup: everything that results depend on, in JSON values.

    Raises:
        CheckpointError: the folder belongs to something else.
    """

    def __init__(self, folder: Path, setup: Mapping[str, Any]) -> None:
        self.folder = folder
        self.setup = wanted = json.loads(json.dumps(setup))
        if (folder / SETUP).is_file():
            known = _read(folder / SETUP)
            odd = sorted(name for name in {*known, *wanted} if known.get(name) != wanted.get(name))
            if odd:
                raise CheckpointError(
                    f"{folder} holds parts of another evaluation ({', '.join(odd)} differ: {known.get(odd[0])!r} there, "
                    f"{wanted.get(odd[0])!r} here); remove it or choose another output."
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} is no folder of an evaluation; choose another output.")

    def get(self, name: str) -> dict[str, Any] | None:
        """A part that is complete, or None."""
        path = self.folder / f"{name}.json"
        return _read(path) if path.is_file() else None

    def put(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep a part.

        Raises:
            CheckpointError: it cannot be written, or holds NaN.
        """
        if not (self.folder / SETUP).is_file():
            write_json(self.folder / SETUP, self.setup)
        write_json(self.folder / f"{name}.json", content)

    def remove(self) -> None:
        """Forget all parts, as the evaluation is complete."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole file or none.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}); free space there or choose another output."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} would hold a number that is none ({error}); check the weights for NaN."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, and its batch is evaluated again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds {type(content).__name__}); remove it.")
    return content
