"""``madtp recipes``: the config files that ship."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from zoo.recipes.catalogue import RecipeEntry

HELP = """List the recipes that ship: configs of madtp train and madtp compress.

A recipe is given by its name: --config NAME. Paths in it are relative to
the folder that the command runs in; --override replaces them. To change
more, copy the file, which --path prints, and give the path of the copy.

[bold]Examples[/bold]

  madtp recipes
  madtp recipes 'blip_*_mini*'
  madtp compress --config blip_vqa_mini_compress --reduction 0.5
  madtp compress --config blip_nlvr -r 0.5 --override settings.root=/data/nlvr2
  cp "$(madtp recipes blip_nlvr --path)" mine.toml
"""


def recipes_command(
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern, such as 'blip*'. Default: all recipes.")] = "",
    paths: Annotated[bool, typer.Option("--path", help="Print the paths of the files only.")] = False,
) -> None:
    """Entry point of the command; see ``HELP``."""
    from madtp.cli.console import output_console
    from madtp.errors import ConfigError
    from zoo.recipes.catalogue import list_recipes, recipe_names
    from zoo.suggestions import did_you_mean

    found = list_recipes(pattern)
    if not found:
        advice = did_you_mean(pattern, recipe_names(), otherwise="`madtp recipes` lists all.")
        raise ConfigError(f"no recipe matches {pattern!r}. {advice}")
    if paths:
        for recipe in found:
            typer.echo(recipe.path)
        return
    for command in ("train", "compress"):
        if chosen := [recipe for recipe in found if recipe.command == command]:
            output_console.print(_table(command, chosen))


def _table(command: str, recipes: Sequence[RecipeEntry]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"madtp {command}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe", min_width=max(len(recipe.name) for recipe in recipes))  # names are there to be copied
    for name in ("task", "model", "data", "what it needs"):
        table.add_column(name, overflow="fold")
    for recipe in recipes:
        needs = Text(", ".join(recipe.needs) or "nothing else")
        table.add_row(recipe.name, recipe.task, recipe.model, recipe.data, needs)
    return table
