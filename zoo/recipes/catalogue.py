"""The recipes that ship, by name: :func:`recipe_path` finds one, :func:`list_recipes` describes all.

What is said of a recipe is read from its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from madtp.errors import ConfigError
from madtp.training.run import read_config
from zoo.suggestions import did_you_mean
from zoo.tasks.registry import task_of

FOLDER = Path(__file__).parent
SUFFIX = ".toml"
_SCENES = "scenes"
_EXTRAS = {"clip_vit_*": "pip install 'madtp[open-clip]'", "llava_*": "pip install 'madtp[hf]'"}
"""What else has to be installed, by pattern of a model's name."""
_FILES = ("checkpoint", "root", "vocabulary", "answers")
"""Settings that name a file or a folder of the user's."""


@dataclass(frozen=True)
class RecipeEntry:
    """What is known of one recipe.

    Attributes:
        name: What ``--config`` calls it.
        path: Its file.
        command: Of madtp that it is for: ``"train"`` or ``"compress"``.
        task: What the model learns.
        model: Name in the zoo.
        data: Name of the data set.
        needs: Files and packages that do not ship; empty if it runs as it is.
    """

    name: str
    path: Path
    command: str
    task: str
    model: str
    data: str
    needs: tuple[str, ...]


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship, sorted."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def list_recipes(pattern: str = "") -> list[RecipeEntry]:
    """Return the recipes whose names match a shell-style pattern, sorted; all of them for an empty pattern."""
    return [_entry(name) for name in recipe_names() if not pattern or fnmatchcase(name, pattern)]


def recipe_path(config: str | Path) -> Path:
    """Return the file of a config.

    Args:
        config: The name of a recipe that ships, with or without ``.toml``, or the path of a file.

    Raises:
        ConfigError: It is neither; the message lists near names.
    """
    path = Path(config)
    if path.is_file():
        return path
    names, stem = recipe_names(), path.name.removesuffix(SUFFIX)
    if path.name == str(config) and stem in names:
        return FOLDER / f"{stem}{SUFFIX}"
    if stem in names:
        advice = f"A recipe of that name ships with madtp: --config {stem}."
    else:
        advice = did_you_mean(stem, names, otherwise="`madtp recipes` lists those that ship.")
    raise ConfigError(f"{str(config)!r} is neither a file nor the name of a recipe. {advice}")


def _entry(name: str) -> RecipeEntry:
    path = FOLDER / f"{name}{SUFFIX}"
    content = read_config(path)
    settings: Mapping[str, Any] = content["settings"]
    model = settings["model"]
    files = [settings[one] for one in _FILES if "data" in settings and settings.get(one)]
    extras = [extra for pattern, extra in _EXTRAS.items() if fnmatchcase(model, pattern)]
    return RecipeEntry(
        name=name,
        path=path,
        command="compress" if ".compress_" in content["recipe"] else "train",
        task=task_of(model),
        model=model,
        data=settings.get("data", _SCENES),
        needs=(*files, *extras),
    )
