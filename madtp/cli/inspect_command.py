"""``madtp inspect``: what the rewriter finds in a model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madtp.cli.plugins import PluginOption, load_plugins

if TYPE_CHECKING:
    from rich.table import Table

    from madtp.report import BlockReport, RewriteReport

HELP = """Show the blocks, streams, pruning sites and refusals of a model.

MODEL is one of these:

  a name from `madtp models`, or of a timm architecture
  the config.json of a transformers model, or its folder
  module:function, a function of yours that takes no arguments and returns
  the model, or the model and its example inputs

Models of the first two kinds get random weights; nothing is downloaded.

[bold]Examples[/bold]

  madtp inspect blip_nlvr_mini
  madtp inspect vit_base_patch16_224 --graph vit.png
  madtp inspect ./clip-vit-large/config.json --json > report.json
  madtp inspect my.module:build
  madtp inspect my_vlm --plugin my_models
"""


def inspect_command(
    model: Annotated[str, typer.Argument(help="Name or configuration file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    graph: Annotated[
        Path | None,
        typer.Option(help="Also draw blocks and streams, to a .png, .svg, .pdf or .dot file.", show_default=False),
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """Entry point of the command; see ``HELP``."""
    import json

    import madtp
    from madtp.atomic_files import check_writable
    from madtp.cli.console import error_console, output_console
    from madtp.errors import ConfigError
    from madtp.pictures.graph import SUFFIXES, draw_graph
    from zoo.examples import find_model

    load_plugins(plugin)
    if graph is not None and graph.suffix not in SUFFIXES:
        raise ConfigError(f"--graph {graph} ends in {graph.suffix!r}; use one of {', '.join(SUFFIXES)}.")
    if graph is not None:
        check_writable(graph)
    with error_console.status(f"building {model}"):
        found = find_model(model)
    parameters = sum(p.numel() for p in found.model.parameters())
    with error_console.status(f"tracing {type(found.model).__name__}, {parameters / 1e6:.1f} M parameters"):
        pruned = madtp.rewrite(found.model, found.example_inputs)
    report = pruned.madtp.report
    if as_json:
        found_as = {"name": found.name, "origin": found.origin, "parameters": parameters}
        typer.echo(json.dumps({**found_as, **report.to_dict()}, indent=2))
    else:
        title = f"[bold]{type(found.model).__name__}[/bold] ({found.origin} {found.name})"
        output_console.print(f"{title}, {parameters / 1e6:.1f} M parameters", soft_wrap=True)
        output_console.print(_streams(report))
        typer.echo(str(report))
    if graph is not None:
        draw_graph(report.network, graph)
        error_console.print(f"graph drawn to {graph}")


def _streams(report: RewriteReport) -> Table:
    """A table with a row for each stream: its blocks, and where its tokens are read."""
    from rich.table import Table

    table = Table("stream", "modality", "width", "blocks", "read out as", title="streams", title_justify="left")
    for stream in report.streams:
        blocks = Counter(_kind(block) for block in report.blocks if block.stream == stream.index)
        counted = ", ".join(f"{count} {kind}" for kind, count in blocks.items())
        table.add_row(str(stream.index), stream.modality, str(stream.width), counted, ", ".join(stream.readouts))
    return table


def _kind(block: BlockReport) -> str:
    """The kind of a block in words, such as "pre-norm self" or "post-norm cross (keys from stream 0)"."""
    source = f" (keys from stream {block.source})" if block.kind == "cross" and block.source is not None else ""
    return f"{block.norm}-norm {block.kind}{source}"
