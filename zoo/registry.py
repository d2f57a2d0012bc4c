"""Names of the models in the zoo. Users call :func:`create` and :func:`list_models`; families call :func:`register`.

Registering costs no import of timm or transformers: an entry holds a builder, and the builder imports what it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path

from torch import nn

from madtp.errors import CheckpointError, ConfigError, UnknownModelError
from zoo.checkpoints.loading import load_checkpoint
from zoo.suggestions import did_you_mean

Builder = Callable[[], nn.Module]

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_entries: dict[str, ModelEntry] = {}


@dataclass(frozen=True)
class ModelEntry:
    """What the zoo knows of one model.

    `input_size` is (channels, height, width) of one image; `mean` and `std` normalise channels scaled to [0, 1].
    `checkpoints` names the weights that lie in the package as `zoo/weights/<name>/<checkpoint>.safetensors`.
    """

    name: str
    builder: Builder
    description: str
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    paper: str
    checkpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.checkpoints):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"'{name}' cannot name a model or checkpoint: use lower-case words and digits joined by '_'."
                )
        if not self.description.strip():
            raise ConfigError(f"Model '{self.name}' needs a description.")


def register(
    name: str,
    *,
    description: str,
    input_size: tuple[int, int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    licence: str,
    paper: str,
    checkpoints: tuple[str, ...] = (),
) -> Callable[[Builder], Builder]:
    """Put a model into the zoo: decorate its builder, or call the result with it.

    See :class:`ModelEntry` for the arguments.

    Raises:
        ConfigError: the name is taken or malformed, or the description is empty.
    """

    def add(builder: Builder) -> Builder:
        entry = ModelEntry(
            name=name,
            builder=builder,
            description=description,
            input_size=input_size,
            mean=mean,
            std=std,
            licence=licence,
            paper=paper,
            checkpoints=checkpoints,
        )
        if name in _entries:
            raise ConfigError(
                f"Model '{name}' is registered already ({_entries[name].description}); choose another name."
            )
        _entries[name] = entry
        return builder

    return add


def list_models(pattern: str = "") -> list[str]:
    """Names that match the shell-style `pattern` (all when empty), sorted."""
    return sorted(name for name in _entries if not pattern or fnmatchcase(name, pattern))


def describe(name: str) -> ModelEntry:
    """The entry of a model.

    Raises:
        UnknownModelError: no such name; the message lists near matches.
    """
    if name in _entries:
        return _entries[name]
    advice = did_you_mean(name, _entries, otherwise=f"Known models: {', '.join(list_models())}.")
    raise UnknownModelError(f"The zoo has no model {name!r}. {advice}")


def weights_folder(model: str) -> Path:
    """Return the folder of the package with the weights of a model: dense ones as a file, pruned ones as folders."""
    return Path(str(resources.files("zoo"))) / "weights" / model


def checkpoint_path(entry: ModelEntry, checkpoint: str | Path) -> Path:
    """The file behind the name of an embedded checkpoint, or behind a path.

    Raises:
        CheckpointError: neither an embedded name nor an existing file.
    """
    if checkpoint in entry.checkpoints:
        path = weights_folder(entry.name) / f"{checkpoint}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"The embedded checkpoint {path} is not there; install the package again.")
        return path
    path = Path(checkpoint)
    if path.is_file():
        return path
    names = ", ".join(map(repr, entry.checkpoints)) or "none"
    raise CheckpointError(
        f"{str(checkpoint)!r} is neither a file nor an embedded checkpoint of {entry.name} (it has: {names})."
    )


def create(name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """Build a model, in eval mode. Its attribute `zoo_name` tells where it came from.

    Args:
        name: a name from :func:`list_models`.
        checkpoint: None for random weights, the name of an embedded checkpoint, or a `.pth` or `.safetensors` file.

    Raises:
        UnknownModelError: no such model.
        CheckpointError: the checkpoint is missing, damaged, or belongs to another model.
    """
    entry = describe(name)
    path = None if checkpoint is None else checkpoint_path(entry, checkpoint)
    model = entry.builder()
    object.__setattr__(model, "zoo_name", name)
    if path is not None:
        load_checkpoint(model, path)
    return model.eval()
