"""``madtp bench --generate``: what pruning saves when a model generates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from madtp.benchmark import Clock
    from madtp.benchmark.generation import GenerationResult
    from zoo.benchmark import GenerationSettings


def refuse_options(*, generate: bool, of_generation: Mapping[str, object], of_others: Mapping[str, object]) -> None:
    """Refuse options that have no effect.

    Args:
        generate: whether generation is measured.
        of_generation: values of options, by name, that belong to generation; what is false was not given.
        of_others: the same for those that do not.

    Raises:
        typer.BadParameter: an option was given that has no effect.
    """
    for name in (name for name, value in (of_others if generate else of_generation).items() if value):
        told = "does not go with --generate" if generate else "needs --generate"
        raise typer.BadParameter(told, param_hint=name)


def parsed_fields(given: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """Return what ``--set FIELD=VALUE``, or an option like it, gave. A value that is not JSON is a string.

    Raises:
        typer.BadParameter: one of them has no ``=``.
    """
    fields = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"{one!r} is not FIELD=VALUE", param_hint=option)
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def run_generation(settings: GenerationSettings, output: Path, clock: Clock) -> None:
    """Measure with a progress bar; print what there is, also after an interruption."""
    import shlex
    import sys

    from madtp.atomic_files import check_writable
    from madtp.cli.console import progress_bar
    from zoo.benchmark import measure_generation

    check_writable(output)
    latest: list[GenerationResult] = []

    def save(result: GenerationResult) -> None:
        latest[:] = [result]
        result.write(output, clock)

    try:
        with progress_bar(settings.model) as notify:
            measure_generation(settings, shlex.join(sys.argv), save=save, notify=notify)
    finally:
        if latest:
            _show(latest[0], settings.model, output, clock)


def _show(result: GenerationResult, title: str, output: Path, clock: Clock) -> None:
    from madtp.benchmark.generation_table import generation_conditions, generation_tables
    from madtp.cli.console import error_console, output_console

    for table in generation_tables(result, title, clock):
        output_console.print(table)
    output_console.print(generation_conditions(result, clock), markup=False, soft_wrap=True)
    for name, note in result.notes.items():
        error_console.print(f"{name}: {note}", markup=False, soft_wrap=True)
    error_console.print(f"results written to {output}", soft_wrap=True)


def generators_table() -> Table:
    """Return a table of the models that generate."""
    from rich.table import Table

    from madtp.cli.console import error_console
    from zoo.benchmark import list_generators

    with error_console.status("looking through transformers"):
        found = list_generators()
    table = Table("models that generate", box=None, pad_edge=False, header_style="bold")
    for name in found:
        table.add_row(name)
    return table
