"""``madtp convert``: checkpoints of other projects as files of this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madtp.cli.plugins import PluginOption, load_plugins

if TYPE_CHECKING:
    from zoo.checkpoints.loading import LoadReport

HELP = """Convert a checkpoint of another project.

SOURCE is one of these:

  a published BLIP or CLIP file (.pth, .pt, and the archives of OpenAI)
  safetensors of transformers (a file, a folder, or the index of shards)
  a checkpoint of the MADTP authors' code

Nothing in it is executed. A missing or unknown key is an error.

If OUTPUT ends in .safetensors, the weights of the dense model are written.
Any other OUTPUT is a folder, for madtp.load: it gets the pruned model of a
checkpoint of the authors' code, with alignment tokens and temperature.

[bold]Examples[/bold]

  madtp convert model_base_retrieval_coco.pth retrieval.safetensors --model blip_retrieval
  madtp convert ViT-L-14-336px.pt clip.safetensors --model clip_vit_l14_336
  madtp convert checkpoint_best.pth pruned-nlvr --model blip_nlvr
"""

DENSE_SUFFIX = ".safetensors"


def convert_command(
    source: Annotated[Path, typer.Argument(help="File or folder to read.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="File or folder to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="Name of the model, as in `madtp models`.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Entry point of the command; see ``HELP``."""
    import json

    from madtp.atomic_files import check_writable
    from madtp.cli.console import error_console, output_console, plain_fields
    from madtp.errors import CheckpointError

    load_plugins(plugin)
    if output.exists():
        raise CheckpointError(f"{output} exists and is not overwritten; delete it or choose another name.")
    check_writable(output)
    with error_console.status(f"reading {source} into {model}"):
        report = _dense(source, output, model) if output.suffix == DENSE_SUFFIX else _pruned(source, output, model)
    if as_json:
        typer.echo(json.dumps({**plain_fields(report), "output": str(output)}, indent=2))
        return
    output_console.print(f"{report.loaded} tensors of format {report.format} written to {output}", soft_wrap=True)
    for name in ("unused", "absent", "resized"):
        for key in getattr(report, name):
            output_console.print(f"{name:8} {key}", soft_wrap=True)


def _dense(source: Path, output: Path, name: str) -> LoadReport:
    import zoo

    model = zoo.create(name)
    report = zoo.load_checkpoint(model, source)
    zoo.save_checkpoint(model, output)
    return report


def _pruned(source: Path, output: Path, name: str) -> LoadReport:
    import madtp
    import zoo
    from zoo.checkpoints.official import load_official

    found = load_official(zoo.create(name), source)
    madtp.save(found.pruned, output)
    return found.report
