"""``madtp bench``: what pruning saves in time, variants of a model taking turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madtp.cli.plugins import PluginOption, load_plugins

if TYPE_CHECKING:
    from rich.table import Table

    from madtp.benchmark import BenchmarkResult, Clock
    from zoo.benchmark import BenchmarkSettings

HELP = """Measure how much time pruning saves.

MODEL is a model of the zoo, or one of timm with random weights. Its variants
take turns in one process: dense, rewritten without pruning, pruned at each
--reduction and as each pruned --checkpoint, by fixed counts, and at equal
MACs by uniform counts and by token merging. The floor runs the dense layers
on the token counts of the pruned model, packed and without scoring: no
implementation with these counts can be much faster.

The samples of a batch differ. Strengths are calibrated on other samples. The
result, a JSON file, is written after every round, so Ctrl-C leaves what was
measured. On a busy machine, CPU time is less disturbed than wall time.

With --generate, MODEL is a class of transformers that reads an image and
words, built small (hf:CLASS), or a config.json of one. The tables have the
time of the prefill and of a step, new tokens a second and the bytes of the
key/value cache, dense and pruned, for each batch and prompt. --text-tokens
sets the words of a prompt, --image-size its image tokens. --set gives the
model a size at which times mean something.

[bold]Examples[/bold]

  madtp bench blip_nlvr_mini --batch 32
  madtp bench blip_nlvr_mini -k dense -k pruned-50 -k pruned-80 --batch 32
  madtp bench blip_nlvr --batch 1 --batch 8 --rounds 9 --plot speed.png
  madtp bench blip_nlvr_mini -k dense -k pruned-80 --where time.png
  madtp bench timm:vit_base_patch16_384 --batch 8 --dtype bfloat16 --threads 2
  madtp bench blip_nlvr_mini --batch 8 --training --memory
  madtp bench blip_nlvr_mini --variant pruned --variant floor --seconds 60
  madtp bench blip_nlvr_mini -k pruned-80 --variant static --variant onnx
  madtp bench --list
  madtp bench hf:LlavaForConditionalGeneration --generate -r 0.3 -b 1
  madtp bench hf:LlavaForConditionalGeneration --generate --image-size 64 \\
    --image-size 128 --text-tokens 32 --set text_config.num_hidden_layers=8
  madtp bench hf:LlavaForConditionalGeneration --generate \\
    --pruning selection=diversity --pruning keep_ratio=0.5 \\
    --pruning 'layers={"*language_model*": [0], "*vision*": []}'
  madtp bench ./llava/config.json --generate --new-tokens 64 --json times.json
  madtp bench --generate --list
"""


def bench_command(
    model: Annotated[str, typer.Argument(help="Name of a model of the zoo or of timm.", show_default=False)] = "",
    checkpoint: Annotated[
        list[str] | None,
        typer.Option("--checkpoint", "-k", help="Weights, dense or pruned. Default: shipped dense ones, else random."),
    ] = None,
    reduction: Annotated[
        list[float] | None,
        typer.Option(
            "--reduction",
            "-r",
            min=0.01,
            max=0.99,
            help="Fraction of the MACs to save. Default: 0.5 and 0.8, and none with a pruned --checkpoint.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", "-b", min=1, help="Samples in a batch. Default: 1 and 8.")
    ] = None,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Batches of each size in a round. Default: as many as hold 4 samples.")
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=2, help="Samples to calibrate on. Default: 64 of data, 16 drawn ones.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds before them that do not.")] = 1,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="Begin no further round after this time, for each batch and prompt size.", show_default=False
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    clock: Annotated[
        str,
        typer.Option(help="Times to compare: wall, or cpu (of all threads). Default: cpu with one thread, else wall."),
    ] = "",
    variant: Annotated[
        list[str] | None, typer.Option(help="Variant to measure beside dense; see --list. Default: all.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Add the dense model by torch.compile, which compiles as it warms up.")
    ] = False,
    training: Annotated[bool, typer.Option("--training", help="Time a forward with its backward, too.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Find the peak memory of a call, too.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of samples and random weights.")] = 0,
    output: Annotated[Path, typer.Option("--output", "--json", "-o", help="JSON file to write.")] = Path(
        "benchmark.json"
    ),
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed-up against MAC ratio to this file.", show_default=False)
    ] = None,
    where: Annotated[
        Path | None,
        typer.Option(help="Draw where the time of pruned models goes to this file, and print it.", show_default=False),
    ] = None,
    list_variants: Annotated[
        bool, typer.Option("--list", help="List the variants, or with --generate the models, and exit.")
    ] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Measure a model that generates.")] = False,
    text_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Words of a prompt (--generate). Default: 16 and 64.")
    ] = None,
    image_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Side of images in pixels (--generate). Default: the model's own.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens to continue each prompt by (--generate). Default: 16.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Field of the configuration, such as text_config.hidden_size=256."
        ),
    ] = None,
    pruning: Annotated[
        list[str] | None,
        typer.Option(
            "--pruning", metavar="FIELD=VALUE", help="Field of madtp.PruningConfig (--generate), such as layers=[1,3]."
        ),
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """Entry point of the command; see ``HELP``."""
    from madtp.cli.bench_generation import generators_table, parsed_fields, refuse_options, run_generation
    from madtp.cli.console import output_console
    from zoo.benchmark import BenchmarkSettings, GenerationSettings

    load_plugins(plugin)
    if list_variants:
        output_console.print(generators_table() if generate else _variants())
        return
    if not model:
        raise typer.BadParameter("name a model; `madtp models` lists them", param_hint="MODEL")
    if clock not in ("", "wall", "cpu"):
        raise typer.BadParameter(f"{clock!r} is neither wall nor cpu", param_hint="--clock")
    chosen: Clock = "cpu" if clock == "cpu" or (not clock and threads == 1) else "wall"
    refuse_options(
        generate=generate,
        of_generation={
            "--text-tokens": text_tokens,
            "--image-size": image_size,
            "--new-tokens": new_tokens,
            "--set": fields,
            "--pruning": pruning,
        },
        of_others={
            "--checkpoint": checkpoint,
            "--variant": variant,
            "--compile": compiled,
            "--training": training,
            "--memory": memory,
            "--plot": plot,
            "--where": where,
        },
    )
    if generate:
        generation = GenerationSettings(
            model=model,
            fields=parsed_fields(fields or ()),
            pruning=parsed_fields(pruning or (), "--pruning"),
            reductions=_reductions(reduction, ()),
            batch_sizes=tuple(dict.fromkeys(batch or (1, 8))),
            text_tokens=tuple(dict.fromkeys(text_tokens or (16, 64))),
            image_sizes=tuple(dict.fromkeys(image_size or ())),
            new_tokens=new_tokens or 16,
            batches=batches,
            calibration_samples=calibration_samples,
            rounds=rounds,
            warm_up=warm_up,
            seconds=seconds,
            threads=threads,
            dtype=dtype,
            seed=seed,
        )
        run_generation(generation, output, chosen)
        return
    checkpoints = tuple(checkpoint or ())
    settings = BenchmarkSettings(
        model=model,
        checkpoints=checkpoints,
        reductions=_reductions(reduction, checkpoints),
        batch_sizes=tuple(dict.fromkeys(batch or (1, 8))),
        batches=batches,
        calibration_samples=calibration_samples,
        rounds=rounds,
        warm_up=warm_up,
        seconds=seconds,
        threads=threads,
        dtype=dtype,
        seed=seed,
        variants=tuple(variant or ()),
        compiled=compiled,
        training=training,
        memory=memory,
        where=where is not None,
    )
    plots = _Plots(speed_ups=plot, time_shares=where)
    _check_files(output, plots)
    _measure(settings, output, plots, chosen)


def _reductions(asked: list[float] | None, checkpoints: tuple[str, ...]) -> tuple[float, ...]:
    if asked is not None:
        return tuple(dict.fromkeys(asked))
    return () if any(name != "dense" for name in checkpoints) else (0.5, 0.8)


@dataclass(frozen=True, kw_only=True)
class _Plots:
    """The files to draw to; None for no such plot."""

    speed_ups: Path | None
    time_shares: Path | None


def _check_files(output: Path, plots: _Plots) -> None:
    """Find what cannot be written before anything is measured."""
    from matplotlib.backend_bases import FigureCanvasBase

    from madtp.atomic_files import check_writable

    check_writable(output)
    formats = FigureCanvasBase.get_supported_filetypes()
    for path in (plots.speed_ups, plots.time_shares):
        if path is not None:
            if path.suffix.removeprefix(".") not in formats:
                raise typer.BadParameter(f"{path.name}: a picture ends in one of {', '.join(sorted(formats))}")
            check_writable(path)


def _measure(settings: BenchmarkSettings, output: Path, plots: _Plots, clock: Clock) -> None:
    """Measure with a progress bar; print and draw what there is, also after an interruption."""
    import shlex
    import sys

    from madtp.cli.console import progress_bar
    from zoo.benchmark import measure

    latest: list[BenchmarkResult] = []

    def save(result: BenchmarkResult) -> None:
        latest[:] = [result]
        result.write(output, clock)

    try:
        with progress_bar(settings.model) as notify:
            measure(settings, shlex.join(sys.argv), save=save, notify=notify)
    finally:
        if latest:
            _show(latest[0], settings, output, plots, clock)


def _show(result: BenchmarkResult, settings: BenchmarkSettings, output: Path, plots: _Plots, clock: Clock) -> None:
    from madtp.benchmark.plot import draw_speed_ups, draw_time_shares
    from madtp.benchmark.table import comparison_tables, conditions, share_table, token_table
    from madtp.cli.console import error_console, output_console

    output_console.print(token_table(result))
    for table in comparison_tables(result, settings.model, clock):
        output_console.print(table)
    shares = share_table(result, clock)
    if shares is not None:
        output_console.print(shares)
    output_console.print(conditions(result), markup=False, soft_wrap=True)
    for name, note in result.notes.items():
        error_console.print(f"{name}: {note}", markup=False, soft_wrap=True)
    for draw, path in ((draw_speed_ups, plots.speed_ups), (draw_time_shares, plots.time_shares)):
        if path is not None:
            draw(result, path, settings.model, clock)
            error_console.print(f"plot drawn to {path}", soft_wrap=True)
    error_console.print(f"results written to {output}", soft_wrap=True)


def _variants() -> Table:
    from rich.table import Table

    from zoo.benchmark import VARIANTS

    table = Table("variant", "what it is", box=None, pad_edge=False, header_style="bold")
    for variant in VARIANTS:
        table.add_row(variant.name, variant.description + (" (if asked for)" if variant.optional else ""))
    return table
