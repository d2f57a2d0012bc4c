"""The consoles of the commands, stdout for results and stderr for progress and notes, and plain data for ``--json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

output_console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


class _NoJsonForm:
    """Marks a value without a JSON form; ``None`` has one."""


NO_JSON_FORM = _NoJsonForm()


def plain_fields(value: DataclassInstance) -> dict[str, object]:
    """Return the fields of a dataclass as JSON values, leaving out those without a JSON form."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: plain for name, item in fields.items() if (plain := to_plain(item)) is not NO_JSON_FORM}


def to_plain(value: object) -> object:
    """Return dataclasses, mappings, sequences and paths as JSON values.

    Fields and entries of any other type are left out; such a value by itself gives :data:`NO_JSON_FORM`.
    """
    if isinstance(value, str | int | float | bool | None):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {str(key): plain for key, item in value.items() if (plain := to_plain(item)) is not NO_JSON_FORM}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain for item in value if (plain := to_plain(item)) is not NO_JSON_FORM]
    if isinstance(value, Path):
        return str(value)
    return NO_JSON_FORM
