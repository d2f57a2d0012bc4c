"""The two consoles of the commands (results to stdout, progress and notes to stderr) and plain data for `--json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

output_console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def to_plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and paths as JSON-able data; fields that are none of these are left out."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {name: plain for name, plain in fields.items() if plain is not _UNKNOWN}
    if isinstance(value, Mapping):
        return {str(key): plain for key, item in value.items() if (plain := to_plain(item)) is not _UNKNOWN}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain for item in value if (plain := to_plain(item)) is not _UNKNOWN]
    if isinstance(value, Path):
        return str(value)
    return _UNKNOWN


class _Unknown:
    """Marks what has no JSON form, as None is a value of its own."""


_UNKNOWN = _Unknown()
