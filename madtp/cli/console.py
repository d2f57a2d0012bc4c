"""The consoles of the commands, stdout for results and stderr for progress and notes, and plain data for ``--json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

output_console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr inside the block.

    Args:
        title: what it says at first.

    Returns:
        A function that takes what is being done, how much of it is done, and how much there is; 0 if that is unknown.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=error_console, transient=True) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda doing, done, total: progress.update(bar, description=doing, completed=done, total=total or None)


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
