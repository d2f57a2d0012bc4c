"""Modules of the user's that register models, data sets, tasks and adapters: the option ``--plugin``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import typer

PluginOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Module of yours to import first, which registers models or data sets. May be repeated.",
        show_default=False,
    ),
]


def load_plugins(modules: Sequence[str] | None) -> None:
    """Import modules of the user's. Those in the present folder are found, behind whatever is installed.

    Raises:
        ConfigError: There is no such module, or it cannot be imported.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    if not modules:
        return
    import zoo  # noqa: F401  (what ships is registered first, so that a name that is taken is told of the user's own)
    from zoo.builders import import_own

    for module in modules:
        import_own(module)
