"""Text that someone else may have written: :func:`read_text`, and JSON by :func:`parse_json` and :func:`read_description`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from madtp.files.limits import DEEPEST, LARGEST_DESCRIPTION, ExceededError, check_bytes, check_depth


def parse_json(text: str) -> Any:
    """Do as :func:`json.loads`; text that nests too deeply for it is an ordinary error.

    Raises:
        ValueError: it is not JSON, or nests too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ExceededError(f"it nests deeper than {DEEPEST} levels") from None


def read_text(path: Path, most: int = LARGEST_DESCRIPTION) -> str:
    """Return the text of a file in UTF-8.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not UTF-8; the message names the line.
    """
    check_bytes("the file", path.stat().st_size, most)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = 1 + path.read_bytes().count(b"\n", 0, error.start)
        raise ValueError(f"line {line} is not UTF-8: {error}") from error


def read_description(path: Path, most: int = LARGEST_DESCRIPTION) -> Any:
    """Return the value of a JSON file, nested to a depth at which code that reads it may recurse.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, too large, or nests too deeply.
    """
    value = parse_json(read_text(path, most))
    check_depth(value)
    return value
