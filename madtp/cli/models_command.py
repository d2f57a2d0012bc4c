"""``madtp models``: the names of the models of the zoo and of timm."""

from __future__ import annotations

from typing import Annotated

import typer

from madtp.cli.plugins import PluginOption, load_plugins

HELP = """List the models of the zoo.

With --timm, also list the architectures of timm, which madtp can inspect
and rewrite as well.

[bold]Examples[/bold]

  madtp models
  madtp models 'blip*'
  madtp models 'vit_*_384' --timm
"""


def models_command(
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern, such as 'blip*'. Default: all models.")] = "",
    timm: Annotated[bool, typer.Option("--timm", help="Also list the architectures of timm.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Entry point of the command; see ``HELP``."""
    from rich.table import Table

    import zoo
    from madtp.cli.console import error_console, output_console

    load_plugins(plugin)
    names = zoo.list_models(pattern)
    table = Table("model", "image", "shipped weights", "what it is", box=None, pad_edge=False, header_style="bold")
    for name in names:
        entry = zoo.describe(name)
        table.add_row(
            name,
            f"{entry.input_size[1]}x{entry.input_size[2]}",
            ", ".join(entry.checkpoints) or "none",
            entry.description,
        )
    if names:
        output_console.print(table)
    others = _timm_names(pattern) if timm else []
    for name in others:
        typer.echo(name)
    if not names and not others:
        hint = "" if timm else "; --timm lists timm's architectures as well"
        error_console.print(f"no model matches {pattern!r}{hint}", style="yellow")
        raise typer.Exit(1)


def _timm_names(pattern: str) -> list[str]:
    import zoo.examples

    return zoo.examples.list_timm_models(pattern)
