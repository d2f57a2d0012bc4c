"""``madtp export``: a pruned model as one file that runs without Python code of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madtp.cli.plugins import PluginOption, load_plugins

if TYPE_CHECKING:
    from rich.table import Table

    from zoo.benchmark.exporting import ExportReport

HELP = """Write a pruned model as one file for deployment.

MODEL is a model of the zoo, or one of timm with random weights. Each site
gets a fixed number of tokens, the mean over calibration samples, so that no
shape depends on the input. Which tokens are kept still does.

The file is checked: its outputs have to equal those of the model, also for
other samples than it was exported with. Then the dense model, the dense
model in the same format, the frozen model and the file take turns on one batch.

[bold]Formats[/bold]

  pt2   a program of torch.export: torch.export.load(FILE).module()(**inputs)
  onnx  for ONNX Runtime and other engines (pip install 'madtp\\[onnx]')
  aoti  compiled to machine code by AOTInductor; needs a C++ compiler:
        torch._inductor.aoti_load_package(FILE)(**inputs)

A file takes inputs of the sizes it was exported with; --any-batch leaves the
number of samples free.

[bold]Examples[/bold]

  madtp export blip_nlvr_mini -k pruned-50 -o nlvr.onnx
  madtp export blip_nlvr_mini -k pruned-80 --format aoti -o nlvr.pt2 --batch 1
  madtp export clip_mini --reduction 0.5 --any-batch -o clip.pt2
  madtp export blip_nlvr -k runs/nlvr-50/pruned -o nlvr.onnx
  madtp export timm:vit_base_patch16_384 --reduction 0.8 -o vit.onnx
"""


def export_command(
    model: Annotated[str, typer.Argument(help="Name of a model of the zoo or of timm.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx, or .pt2.", show_default=False)],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            "-k",
            help="Weights, dense or pruned. Default: shipped dense ones, else random.",
            show_default=False,
        ),
    ] = None,
    reduction: Annotated[
        float | None,
        typer.Option(
            "--reduction",
            "-r",
            min=0.01,
            max=0.99,
            help="Fraction of the MACs of a dense model to save. Default: 0.5.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="pt2, onnx or aoti. Default: by the suffix of the file.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Samples in a batch.")] = 8,
    any_batch: Annotated[bool, typer.Option("--any-batch", help="Take any number of samples, 2 or more.")] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds to time; 0 for none.")] = 5,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of samples and random weights.")] = 0,
    plugin: PluginOption = None,
) -> None:
    """Entry point of the command; see ``HELP``."""
    from madtp.cli.console import error_console, output_console
    from zoo.benchmark.exporting import ExportSettings, export_model

    load_plugins(plugin)
    settings = ExportSettings(
        model=model,
        output=output,
        checkpoint=checkpoint,
        reduction=reduction,
        format=format,
        batch=batch,
        any_batch=any_batch,
        rounds=rounds,
        threads=threads,
        seed=seed,
    )
    with error_console.status(f"opening {model}") as status:
        report = export_model(settings, notify=status.update)
    if report.seconds:
        output_console.print(_times(report, batch))
    exported = report.exported
    output_console.print(
        f"{exported.path} ({exported.format}, {exported.megabytes:.1f} MiB): outputs equal those of the frozen model to "
        f"{exported.difference:.1g} of their largest entry",
        markup=False,
        soft_wrap=True,
    )


def _times(report: ExportReport, batch: int) -> Table:
    from rich.table import Table

    dense = report.seconds["dense"]
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"{batch} samples", title_justify="left")
    table.add_column("")
    for name in ("ms", "speed-up", "MACs"):
        table.add_column(name, justify="right")
    for name, seconds in report.seconds.items():
        macs = report.dense_macs if name.startswith("dense") else report.macs
        table.add_row(name, f"{1000 * seconds:.1f}", f"{dense / seconds:.2f}", f"{macs / 1e9:.3g} G")
    return table
