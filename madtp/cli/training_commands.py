"""`madtp train` and `madtp compress`: run a training recipe from a config file, with single values overridden."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

TRAIN_HELP = """Train a model as a config file says.

Without --config, trains the demonstration's model on scenes. The run can be
interrupted at any time and resumed with the same result. Started by
torchrun or accelerate, the processes divide every batch among them.

[bold]Examples[/bold]

  madtp train --output runs/dense
  madtp train --output runs/dense --resume
  madtp train -o runs/quick --override training.steps=200
  madtp train --config mine.toml --output runs/mine
  torchrun --nproc-per-node 2 -m madtp train --output runs/both
"""

COMPRESS_HELP = """Prune a trained model and fine-tune it to a compute budget.

--reduction 0.8 asks for 80% fewer MACs. Without --config, compresses the
demonstration's model on scenes.

[bold]Examples[/bold]

  madtp compress --reduction 0.8 --output runs/pruned-80
  madtp compress --reduction 0.5 -o runs/mine --checkpoint runs/dense/dense.safetensors
  torchrun --nproc-per-node 2 -m madtp compress --reduction 0.8
"""

TRAIN_CONFIG = "blip_nlvr_mini"
COMPRESS_CONFIG = "blip_nlvr_mini_compress"

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML or JSON file; see the shipped ones in zoo/recipes.")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints and the finished model.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--override", metavar="NAME=VALUE", help="Replace a value of the config; may be repeated."),
]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 ...")]


def train_command(
    output: OutputOption = Path("runs/dense"),
    config: ConfigOption = None,
    resume: ResumeOption = False,
    override: OverrideOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Entry point of `madtp train`; see TRAIN_HELP."""
    _run(config or _shipped(TRAIN_CONFIG), output, parse_overrides(override or ()), resume, device)


def compress_command(
    reduction: Annotated[
        float, typer.Option("--reduction", "-r", min=0.01, max=0.99, help="Fraction of the dense MACs to save.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Output folder.  [default: runs/pruned-PERCENT]", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Dense weights to start from; default: the shipped ones.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    resume: ResumeOption = False,
    override: OverrideOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Entry point of `madtp compress`; see COMPRESS_HELP."""
    values = {"settings.reduction": reduction, **parse_overrides(override or ())}
    if checkpoint is not None:
        values["settings.checkpoint"] = str(checkpoint)
    folder = output or Path("runs") / f"pruned-{100 * reduction:.0f}"
    _run(config or _shipped(COMPRESS_CONFIG), folder, values, resume, device)


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """ "training.steps=200" as {"training.steps": 200}; a value that is no JSON is a string.

    Raises:
        ConfigError: there is no "=" or no name.
    """
    from madtp.errors import ConfigError

    values: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"--override {text!r} is no NAME=VALUE; write training.steps=200, say.")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values


def apply_overrides(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config with values replaced; names are dotted paths of tables.

    Raises:
        ConfigError: a path leads through something that is no table.
    """
    from madtp.errors import ConfigError

    changed: dict[str, Any] = json.loads(json.dumps(content))
    for name, value in values.items():
        *tables, last = name.split(".")
        place = changed
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--override {name}: {table!r} is a value in the config, not a table.")
        place[last] = value
    return changed


def _shipped(name: str) -> Path:
    from importlib import resources

    return Path(str(resources.files("zoo"))) / "recipes" / f"{name}.toml"


def _run(config: Path, output: Path, values: Mapping[str, Any], resume: bool, device: str) -> None:
    from madtp.cli.console import output_console
    from madtp.processes import launched
    from madtp.training.progress import Progress
    from madtp.training.run import read_config, train

    content = apply_overrides(read_config(config), values)
    result = train(content, output, resume=resume, device=device, progress=Progress(output_console))
    if launched().main:
        output_console.print(f"{result.steps} steps done; everything lies in {output}", soft_wrap=True)
