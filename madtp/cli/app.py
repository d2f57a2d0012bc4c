"""The command-line application: global options, errors as messages, and the list of commands.

Commands import torch, timm and the rest of the library when they run, so that ``madtp --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from madtp.cli import (
    bench_command,
    convert_command,
    demo_command,
    eval_command,
    export_command,
    inspect_command,
    models_command,
    recipes_command,
    show_command,
    survey_command,
    training_commands,
)
from madtp.errors import MadtpError

HELP = """Make a vision-language transformer faster by pruning its tokens.

madtp takes an unmodified model, finds its transformer blocks, and makes each
layer keep, for each sample, only the tokens that matter to the other
modality.

[bold]Where to start[/bold]

  madtp demo                          measure and draw the shipped models
  madtp inspect vit_base_patch16_224  see what would be pruned in a model
  madtp train, then madtp compress    train a model, then prune it

Compute is counted in MACs (multiply-accumulates) per sample, which papers
of the field print as "FLOPs".
"""

EPILOG = "The exit code is 1 after an error and 2 after wrong usage. For a traceback: madtp --debug COMMAND."


class MessageGroup(TyperGroup):
    """Commands that report a :class:`MadtpError` as a red message, with exit code 1."""

    def invoke(self, ctx: Any) -> object:  # typer keeps the class of the context private
        """Run the command and report its errors."""
        try:
            return super().invoke(ctx)
        except MadtpError as error:
            if ctx.params.get("debug"):
                raise
            # Text, not markup: a message may hold brackets, as tensor shapes do.
            message = Text.assemble((f"{type(error).__name__}: ", "bold red"), (str(error), "red"))
            Console(stderr=True, soft_wrap=True).print(message)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted", style="yellow")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=MessageGroup,
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if not asked:
        return
    try:
        installed = version("madtp")
    except PackageNotFoundError:
        installed = "(not installed)"
    typer.echo(f"madtp {installed}")
    raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Global options; :class:`MessageGroup` reads ``debug`` from the context."""


app.command("demo", help=demo_command.HELP)(demo_command.demo_command)
app.command("inspect", help=inspect_command.HELP)(inspect_command.inspect_command)
app.command("show", help=show_command.HELP)(show_command.show_command)
app.command("train", help=training_commands.TRAIN_HELP)(training_commands.train_command)
app.command("compress", help=training_commands.COMPRESS_HELP)(training_commands.compress_command)
app.command("convert", help=convert_command.HELP)(convert_command.convert_command)
app.command("eval", help=eval_command.HELP)(eval_command.eval_command)
app.command("bench", help=bench_command.HELP)(bench_command.bench_command)
app.command("export", help=export_command.HELP)(export_command.export_command)
app.command("survey", help=survey_command.HELP)(survey_command.survey_command)
app.command("recipes", help=recipes_command.HELP)(recipes_command.recipes_command)
app.command("models", help=models_command.HELP)(models_command.models_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: command and options; ``None`` takes those of the process.
    """
    app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="madtp")
