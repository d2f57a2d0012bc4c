"""``madtp demo``: measure and draw the shipped models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Compare the shipped dense and pruned models on held-out scenes.

Runs offline, in one to three minutes. Prints a table of accuracy, MACs, tokens
kept in each layer, and milliseconds. Writes a picture and a page that show
which patches survive in which layer.

[bold]Examples[/bold]

  madtp demo
  madtp demo --samples 64 --output /tmp/demo
"""


def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the picture and the page.")] = Path(
        "madtp-demo"
    ),
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Held-out scenes to measure on.")] = 512,
    seed: Annotated[int, typer.Option(help="Edition of the held-out scenes.")] = 0,
) -> None:
    """Entry point of the command; see ``HELP``."""
    from madtp.cli.console import output_console
    from madtp.demo import run_demo

    result = run_demo(output, samples=samples, seed=seed, console=output_console)
    output_console.print(f"picture  {result.picture}\npage     {result.page}", soft_wrap=True)
