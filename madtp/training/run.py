"""Run a recipe from a config: :func:`train`, which ``madtp train`` and ``madtp compress`` call.

A config file (TOML or JSON) names a recipe module and holds two tables of settings, one for the engine and one for the
recipe::

    recipe = "zoo.recipes.scenes_dense"
    [training]
    steps = 5000
    [settings]
    pictures_per_step = 64

The recipe module has the functions of :class:`Recipe`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from madtp.atomic_files import check_writable_folder
from madtp.errors import ConfigError
from madtp.files.json_text import read_description, read_text
from madtp.files.limits import shown
from madtp.processes import joined
from madtp.saving.output_lock import claimed
from madtp.training.config import TrainingConfig
from madtp.training.engine import LOCK, Learner, TrainingResult, fit
from madtp.training.progress import Progress

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TABLES = ("recipe", "training", "settings")


LearnerT = TypeVar("LearnerT", bound=Learner)


class Recipe(Protocol[LearnerT]):
    """What a recipe module offers.

    :meth:`finish` gets the very object that :meth:`build` returned. A recipe that needs more there returns a subclass of
    :class:`~madtp.training.engine.Learner` with fields of its own.
    """

    def build(self, settings: Mapping[str, Any], training: TrainingConfig) -> LearnerT:
        """Make the learner, from the recipe's own settings and those of the engine."""

    def finish(self, learner: LearnerT, result: TrainingResult, output: Path) -> None:
        """Write what the run is for. Called once the last step is done, in one process only."""


def train(
    config: str | Path | Mapping[str, object],
    output: str | Path,
    *,
    resume: bool = False,
    resume_anyway: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> TrainingResult:
    """Train as a config says, and write everything below ``output``.

    If torchrun or accelerate started several processes, they divide every batch among them, and the first one writes.

    Args:
        config: path of a TOML or JSON file, or its content.
        output: folder for checkpoints, the finished weights and their model card.
        resume: continue from the last checkpoint in ``output``; see :func:`madtp.training.engine.fit`.
        resume_anyway: continue also if the config has changed; see there.
        device: torch device; with several processes, ``"cuda"`` is the GPU of each.
        progress: where numbers are shown; ``None`` shows them on the terminal.
        stop_after: total number of steps after which to stop, with a checkpoint to resume from.

    Raises:
        ConfigError: if the config cannot be read, or holds something that the recipe does not know.
        TrainingError: if training fails; the message says where to resume.
        CheckpointError: if the checkpoint to resume from is unusable, or was written with another config.
        OutputInUseError: if another run writes to ``output``.
        UnwritableError: if ``output`` is a file, cannot be written, or the disk is full; checkpoints that are there stay.
    """
    opened = open_recipe(config)
    recipe, training, settings = opened.recipe, opened.training, opened.settings
    folder = Path(output)
    check_writable_folder(folder)
    with ExitStack() as held:
        with joined(device) as (processes, place):
            held.enter_context(claimed(folder, folder / LOCK, processes))
            learner = recipe.build(settings, training)
            learner.depends_on = {"settings": settings, **learner.depends_on, "recipe": opened.name}
            result = fit(
                learner,
                training,
                folder,
                resume=resume,
                resume_anyway=resume_anyway,
                device=place,
                progress=progress,
                stop_after=stop_after,
            )
        if processes.main and result.steps == training.steps:
            recipe.finish(learner, result, folder)
    return result


@dataclass(frozen=True)
class OpenedRecipe:
    """What a config asks for.

    Attributes:
        name: of the recipe module.
        recipe: the module.
        training: settings of the engine.
        settings: those of the recipe, which its ``build`` checks.
    """

    name: str
    recipe: Recipe[Learner]
    training: TrainingConfig
    settings: Mapping[str, Any]


def open_recipe(config: str | Path | Mapping[str, object]) -> OpenedRecipe:
    """Read a config, check the settings of the engine, and import the recipe; see :func:`train`.

    Raises:
        ConfigError: if the config cannot be read, a value in it is out of range, or there is no such recipe.
    """
    content = read_config(config)
    training = TrainingConfig.from_dict(content["training"])
    return OpenedRecipe(content["recipe"], _recipe(content["recipe"]), training, content["settings"])


def read_config(config: str | Path | Mapping[str, object]) -> dict[str, Any]:
    """Read a config and check its outermost level; tables that it leaves out are empty.

    Raises:
        ConfigError: if the file does not exist or is neither TOML nor JSON, if a table is unknown or none, or if no recipe is
            named.
    """
    read, where = (config, "the config") if isinstance(config, Mapping) else (_parse(Path(config)), str(config))
    if not isinstance(read, Mapping):
        raise ConfigError(f"{where} is {shown(read)}; it has to name a recipe and hold tables of settings")
    content: dict[str, Any] = {"training": {}, "settings": {}, **read}
    if unknown := sorted(set(content) - set(_TABLES)):
        raise ConfigError(f"{where} holds {', '.join(unknown)}; known at the top are {', '.join(_TABLES)}")
    if not isinstance(content.get("recipe"), str):
        raise ConfigError(f'{where} names no recipe; add a line such as recipe = "zoo.recipes.scenes_dense"')
    for name in ("training", "settings"):
        if not isinstance(content[name], Mapping):
            raise ConfigError(f"{where}: {name!r} is {shown(content[name])}; it has to be a table of settings")
    return content


def _parse(path: Path) -> object:
    try:
        if path.suffix == ".json":
            return read_description(path)
        parsed: dict[str, object] = tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    return parsed


def _recipe(name: str) -> Recipe[Learner]:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"the recipe is {shown(name)}, which is no name of a module such as zoo.recipes.scenes_dense")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise ConfigError(f"there is no recipe module {name!r}") from error
    if missing := [part for part in ("build", "finish") if not hasattr(module, part)]:
        raise ConfigError(f"the module {name!r} is not a recipe: it has no {' and no '.join(missing)}")
    return cast(Recipe[Learner], module)
