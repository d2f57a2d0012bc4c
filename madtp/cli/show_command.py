"""``madtp show``: which patches of the user's own images survive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from madtp.cli.plugins import PluginOption, load_plugins

HELP = """Draw which patches of your images a pruned model keeps, layer by layer.

MODEL is a folder that madtp.save or madtp compress wrote, or a name from
`madtp models`. Of a named model, all shipped pruned weights are drawn, or
those of each --checkpoint. Patches in colour survive a layer; faded ones were
dropped there or before.

Images are resized to the model's size. A model that reasons about two images
takes them in pairs. In Python, madtp.pictures.show draws any pruned model.

[bold]Examples[/bold]

  madtp show photo.jpg --model blip_retrieval_mini
  madtp show left.png right.png --model blip_nlvr_mini -k pruned-80
  madtp show *.jpg --model runs/pruned-50/pruned --layers 12 -o kept.png
  madtp show photo.jpg --model my_vlm -k runs/mine --plugin my_models
"""


def show_command(
    images: Annotated[list[Path], typer.Argument(help="Files of images.", show_default=False)],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Folder of a pruned model, or name in the zoo.", show_default=False)
    ],
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint", "-k", help="Pruned weights of a named model. May be repeated. Default: all that ship."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write, by its suffix.")] = Path("kept.png"),
    layers: Annotated[int, typer.Option("--layers", "-l", min=1, help="Most layers to draw, evenly spread.")] = 6,
    plugin: PluginOption = None,
) -> None:
    """Entry point of the command; see ``HELP``."""
    from matplotlib.backend_bases import FigureCanvasBase

    from madtp.atomic_files import check_writable
    from madtp.cli.console import error_console, output_console
    from madtp.pictures import show

    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix.removeprefix(".") not in formats:
        raise typer.BadParameter(f"{output.name}: a picture ends in one of {', '.join(sorted(formats))}")
    check_writable(output)
    load_plugins(plugin)
    from zoo.tasks.own_images import inputs_of_images, open_pruned

    with error_console.status(f"opening {model}") as status:
        pruned = open_pruned(model, checkpoint or ())
        inputs = inputs_of_images(next(iter(pruned.values())), images)
        status.update(f"running {model}")
        show(pruned, images, inputs, output, title=f"What {Path(model).name} keeps", layers=layers)
    output_console.print(f"picture  {output}", soft_wrap=True)
