"""``madtp train`` and ``madtp compress``: run a recipe from a config file, with single values overridden."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from madtp.cli.plugins import PluginOption, load_plugins

TRAIN_HELP = """Train a model as a config file says.

--config takes the name of a recipe, which `madtp recipes` lists, or a file.
Without it, the demonstration's model is trained on scenes. A run can
be interrupted at any time and resumed with the same result; a config that
has changed is refused. Several processes, started by torchrun or accelerate,
divide every batch.

[bold]Examples[/bold]

  madtp train --output runs/dense
  madtp train --output runs/dense --resume
  madtp train -o runs/quick --override training.steps=200
  madtp train --config clip_mini --output runs/clip
  madtp train --config mine.toml --output runs/mine
  madtp train --config mine.toml --plugin my_models --output runs/mine
  torchrun --nproc-per-node 2 -m madtp train --output runs/both
"""

COMPRESS_HELP = """Prune a trained model and fine-tune it to a compute budget.

--reduction 0.8 asks for 80% fewer MACs. --config takes the name of a recipe,
which `madtp recipes` lists, or a file. Without it, the demonstration's model
is compressed on scenes.

[bold]Examples[/bold]

  madtp compress --reduction 0.8 --output runs/pruned-80
  madtp compress --reduction 0.5 -o runs/mine --checkpoint runs/dense/dense.safetensors
  madtp compress --reduction 0.5 --config blip_nlvr --override settings.root=nlvr2
  torchrun --nproc-per-node 2 -m madtp compress --reduction 0.8
"""

TRAIN_CONFIG = "blip_nlvr_mini"
COMPRESS_CONFIG = "blip_nlvr_mini_compress"

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="Recipe, as in `madtp recipes`, or a TOML or JSON file.", show_default=False),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints and the finished model.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in the output folder.")]
ResumeAnywayOption = Annotated[
    bool, typer.Option("--resume-anyway", help="Continue even if the config has changed; implies --resume.")
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--override", metavar="NAME=VALUE", help="Replace a value of the config. May be repeated."),
]
DeviceOption = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1 ...")]


def train_command(
    output: OutputOption = Path("runs/dense"),
    config: ConfigOption = None,
    resume: ResumeOption = False,
    resume_anyway: ResumeAnywayOption = False,
    override: OverrideOption = None,
    device: DeviceOption = "cpu",
    plugin: PluginOption = None,
) -> None:
    """Entry point of ``madtp train``; see ``TRAIN_HELP``."""
    load_plugins(plugin)
    values = parse_overrides(override or ())
    _run(config or TRAIN_CONFIG, output, values, resume=resume, resume_anyway=resume_anyway, device=device)


def compress_command(
    reduction: Annotated[
        float, typer.Option("--reduction", "-r", min=0.01, max=0.99, help="Fraction of the dense MACs to save.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Output folder. Default: runs/pruned-PERCENT.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Dense weights to start from. Default: the shipped ones.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    resume: ResumeOption = False,
    resume_anyway: ResumeAnywayOption = False,
    override: OverrideOption = None,
    device: DeviceOption = "cpu",
    plugin: PluginOption = None,
) -> None:
    """Entry point of ``madtp compress``; see ``COMPRESS_HELP``."""
    load_plugins(plugin)
    values = {"settings.reduction": reduction, **parse_overrides(override or ())}
    if checkpoint is not None:
        values["settings.checkpoint"] = str(checkpoint)
    folder = output or Path("runs") / f"pruned-{100 * reduction:.0f}"
    _run(config or COMPRESS_CONFIG, folder, values, resume=resume, resume_anyway=resume_anyway, device=device)


def parse_overrides(texts: Sequence[str]) -> dict[str, object]:
    """Parse ``["training.steps=200"]`` as ``{"training.steps": 200}``; a value that is not JSON is a string.

    Raises:
        ConfigError: if a text has no "=" or no name.
    """
    from madtp.errors import ConfigError

    values: dict[str, object] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"--override {text!r} is not of the form NAME=VALUE, as in training.steps=200.")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values


def apply_overrides(content: Mapping[str, object], values: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of a config with values replaced.

    Args:
        content: the config.
        values: new values by dotted path, such as ``training.steps``.

    Raises:
        ConfigError: if a path leads through a value that is not a table.
    """
    from madtp.errors import ConfigError

    changed: dict[str, object] = json.loads(json.dumps(content))
    for name, value in values.items():
        *path, last = name.split(".")
        table = changed
        for step in path:
            inner = table.setdefault(step, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--override {name}: {step!r} is a value in the config, not a table.")
            table = inner
        table[last] = value
    return changed


def _run(
    config: str, output: Path, values: Mapping[str, object], *, resume: bool, resume_anyway: bool, device: str
) -> None:
    from madtp.cli.console import output_console
    from madtp.processes import launched
    from madtp.training.progress import Progress
    from madtp.training.run import read_config, train
    from zoo.recipes.catalogue import recipe_path

    content = apply_overrides(read_config(recipe_path(config)), values)
    result = train(
        content,
        output,
        resume=resume,
        resume_anyway=resume_anyway,
        device=device,
        progress=Progress(output_console),
    )
    if launched().main:
        output_console.print(f"{result.steps} steps done; results are in {output}", soft_wrap=True)
