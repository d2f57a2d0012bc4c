"""What a file may ask for, whatever it says: how deep it nests, how large it makes things, which names and numbers it uses.

Every reader of files checks what it finds here before it allocates, recurses or opens anything. Start at the constants. The
checks raise :class:`ExceededError`; readers turn it into their own error, which names the file.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath, PureWindowsPath
from typing import TypeGuard

DEEPEST = 64
"""Levels of lists, objects and tuples inside each other."""

LARGEST_DESCRIPTION = 64 << 20
"""Bytes of a JSON file that describes a model. Data sets are larger."""

LARGEST_ANNOTATIONS = 4 << 30
"""Bytes of a JSON file with the annotations of a data set."""

LONGEST_NAME = 255
"""Bytes of the name of a file: as many as file systems take."""

LONGEST_KEY = 1000
"""Characters of the name of a tensor."""

MOST_EXPANSION = 8
"""What an archive may hold, unpacked, as a multiple of its own size. Weights hardly compress."""

FREE_BYTES = 64 << 20
"""Bytes that a file may ask for whatever its own size."""

LARGEST_COUNT = 2**31 - 1
"""The largest number of tokens, channels or the like."""

LARGEST_FILE = 2**63 - 1
"""The largest size of a file."""


class ExceededError(ValueError):
    """A file asks for more than the limits allow."""


def check_depth(value: object) -> None:
    """Refuse lists, tuples and dictionaries that nest deeper than :data:`DEEPEST`."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise ExceededError(f"it nests deeper than {DEEPEST} levels")
        depth += 1
        containers = [one for one in level if isinstance(one, (list, tuple, dict)) and one]
        level = [item for one in containers for item in (one.values() if isinstance(one, dict) else one)]


def check_bytes(what: str, wanted: int, most: int) -> None:
    """Refuse a size.

    Args:
        what: whose size it is, for the message.
        wanted: bytes that the file asks for.
        most: bytes that it may ask for.
    """
    if wanted > most:
        raise ExceededError(f"{what} takes {_size(wanted)} where {_size(most)} at most fit")


def is_file_name(name: object) -> TypeGuard[str]:
    """Whether a value names a file in a folder: a string without folders in it, on any system."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name:
        return False
    plain = all(path(name).name == name for path in (PurePosixPath, PureWindowsPath))
    return plain and len(name.encode("utf-8", "surrogatepass")) <= LONGEST_NAME


def finite(value: object, name: str) -> float:
    """Return a number as a float.

    Raises:
        ExceededError: it is no number, not finite, or too large for a float.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ExceededError(f"{name} is {shown(value)}, not a finite number")


def count(value: object, name: str, low: int = 0, most: int = LARGEST_COUNT) -> int:
    """Return a whole number from ``low`` to ``most``.

    Raises:
        ExceededError: it is something else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= most:
        return value
    raise ExceededError(f"{name} is {shown(value)}, not a whole number from {low} to {most}")


def shown(value: object) -> str:
    """Return a value as a message shows it: short, however long, deep or large the value is."""
    if isinstance(value, int) and value.bit_length() > LONGEST_NAME:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}" if value else f"an empty {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _size(count: int) -> str:
    return f"{count} bytes" if count < 1 << 20 else f"{count / (1 << 20):.0f} MiB"
