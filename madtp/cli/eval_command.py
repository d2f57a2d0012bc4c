"""``madtp eval``: a model, dense or pruned, on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from madtp.cli.plugins import PluginOption, load_plugins

if TYPE_CHECKING:
    from rich.table import Table

    from zoo.tasks import EvaluationSettings

HELP = """Evaluate a model of the zoo, dense or pruned, on a data set.

The model determines the task. With --reduction, the model is pruned first,
so that it saves this fraction of its MACs on --calibration-split. A saved
pruned model needs no --reduction.

The result is a JSON file with metrics, compute and the configuration. To
resume an interrupted evaluation, give the same command again. Several
processes, started by torchrun or accelerate, divide the batches.

[bold]Examples[/bold]

  madtp eval --model blip_nlvr_mini --checkpoint dense --limit 512
  madtp eval --model blip_nlvr_mini --checkpoint dense --reduction 0.5
  madtp eval --model blip_nlvr_mini --checkpoint pruned-80 --per-sample
  madtp eval --model blip_nlvr --checkpoint model_base_nlvr.pth --data nlvr2 --root nlvr2 --vocabulary vocab.txt
  madtp eval --model blip_vqa -k model_vqa.pth --data vqav2 --root vqa --vocabulary vocab.txt --answers list.json
  madtp eval --model blip_vqa --checkpoint model_vqa.pth --data vqav2 --root coco --split val --vocabulary vocab.txt
  torchrun --nproc-per-node 2 -m madtp eval --model blip_nlvr_mini --checkpoint dense
  madtp eval --model blip_nlvr_mini -k dense --data my_scenes --plugin my_data
  madtp eval --list
"""


def eval_command(
    model: Annotated[str, typer.Option("--model", "-m", help="Name of a model of the zoo.", show_default=False)] = "",
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", "-k", help="Shipped weights, a file, or a saved folder. Default: random weights."),
    ] = None,
    data: Annotated[str, typer.Option("--data", "-d", help="Name of a data set; see --list.")] = "scenes",
    root: Annotated[Path | None, typer.Option(help="Folder with annotations and images.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    annotations: Annotated[
        Path | None, typer.Option(help="Annotation file that replaces the usual one below --root.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Largest number of samples.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Edition of generated data sets.")] = 0,
    reduction: Annotated[
        float | None,
        typer.Option("--reduction", "-r", min=0.01, max=0.99, help="Fraction of the MACs to save.", show_default=False),
    ] = None,
    calibration_split: Annotated[str, typer.Option(help="Split to calibrate --reduction on.")] = "train",
    calibration_samples: Annotated[int, typer.Option(min=2, help="Samples to calibrate --reduction on.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples in a batch.")] = 32,
    vocabulary: Annotated[
        Path | None, typer.Option(help="vocab.txt of bert-base-uncased, for full-size models.", show_default=False)
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="JSON list to choose answers from. Default: answers are generated.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1 ...")] = "cpu",
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")] = Path("evaluation.json"),
    per_sample: Annotated[
        bool, typer.Option("--per-sample", help="Also write the answer and token counts of each sample.")
    ] = False,
    list_data: Annotated[bool, typer.Option("--list", help="List the data sets and exit.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Entry point of the command; see ``HELP``."""
    from madtp.cli.console import output_console
    from madtp.processes import launched
    from zoo.tasks import EvaluationSettings

    load_plugins(plugin)
    if list_data:
        output_console.print(_data_sets())
        return
    if not model:
        raise typer.BadParameter("name a model; `madtp models` lists them", param_hint="--model")
    settings = EvaluationSettings(
        model=model,
        checkpoint=checkpoint,
        data=data,
        root=root,
        split=split,
        annotations=annotations,
        limit=limit,
        seed=seed,
        reduction=reduction,
        calibration_split=calibration_split,
        calibration_samples=calibration_samples,
        batch_size=batch_size,
        vocabulary=vocabulary,
        answers=answers,
        device=device,
    )
    content = _run(settings, output, per_sample)
    if launched().main:
        output_console.print(_table(content))
        output_console.print(f"results written to {output}", soft_wrap=True)


def _run(settings: EvaluationSettings, output: Path, per_sample: bool) -> dict[str, Any]:
    """Evaluate with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from madtp.cli.console import error_console
    from madtp.processes import launched
    from zoo.tasks import evaluate_settings

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console, disable=not launched().main) as progress:
        bar = progress.add_task(settings.model, total=None)
        return evaluate_settings(
            settings,
            output,
            per_sample=per_sample,
            begin=lambda samples: progress.update(bar, total=samples),
            advance=lambda samples: progress.advance(bar, samples),
        )


def _table(content: dict[str, Any]) -> Table:
    """The table of metrics and compute."""
    from rich.table import Table

    configuration, compute = content["configuration"], content["compute"]
    title = (
        f"{configuration['model']} on {content['samples']} samples of {configuration['data']}, {configuration['split']}"
    )
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in content["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    if compute["macs"] is not None:
        table.add_row("MACs per sample", f"{compute['macs'] / 1e6:.1f} M")
        table.add_row("dense", f"{compute['dense_macs'] / 1e6:.1f} M")
        table.add_row("saved", f"{compute['reduction']:.1%}")
    return table


def _data_sets() -> Table:
    from rich.table import Table

    import zoo

    table = Table("data set", "for", "splits", "what it is", box=None, pad_edge=False, header_style="bold")
    for name in zoo.list_data():
        entry = zoo.describe_data(name)
        table.add_row(name, ", ".join(entry.tasks), ", ".join(entry.splits), entry.description)
    return table
