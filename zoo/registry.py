"""Names of the models in the zoo. Users call :func:`create` and :func:`list_models`; families call :func:`register`.

Registering a model imports neither timm nor transformers: an entry holds a builder, which imports what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from madtp.errors import CheckpointError, ConfigError, UnknownModelError
from madtp.saving.model_folder import CONFIG
from zoo.checkpoints.loading import load_checkpoint
from zoo.named import SNAKE_CASE, Registry
from zoo.shipped import ShippedCheckpoint, shipped_checkpoints, weights_folder

__all__ = [
    "Builder",
    "ModelEntry",
    "register",
    "list_models",
    "describe",
    "checkpoint_path",
    "create",
    "weights_folder",
    "MODELS",
]

Builder = Callable[[], nn.Module]


@dataclass(frozen=True)
class ModelEntry:
    """What the zoo knows of one model.

    Attributes:
        name: What :func:`create` calls it.
        builder: Makes the model with random weights.
        description: A line for people.
        input_size: Channels, height and width of one image.
        mean: What is subtracted from channels scaled to [0, 1].
        std: What they are then divided by.
        licence: Of the weights.
        paper: A link.
        shipped: The weights of it that lie in the package.
    """

    name: str
    builder: Builder
    description: str
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    paper: str
    shipped: tuple[ShippedCheckpoint, ...] = ()

    def __post_init__(self) -> None:
        if not self.description.strip():
            raise ConfigError(f"The model '{self.name}' needs a description.")

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of the shipped weights, dense and pruned."""
        return tuple(checkpoint.name for checkpoint in self.shipped)


MODELS: Registry[ModelEntry] = Registry(
    "model", names=SNAKE_CASE, advice="use lower-case words and digits joined by '_'", unknown=UnknownModelError
)


def register(
    name: str,
    *,
    description: str,
    input_size: tuple[int, int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    licence: str,
    paper: str,
    shipped: tuple[ShippedCheckpoint, ...] | None = None,
) -> Callable[[Builder], Builder]:
    """Put a model into the zoo: decorate its builder, or call the result with it.

    Args:
        name: Lower-case words and digits joined by ``_``.
        description: A line for people.
        input_size: Channels, height and width of one image.
        mean: What is subtracted from channels scaled to [0, 1].
        std: What they are then divided by.
        licence: Of the weights.
        paper: A link.
        shipped: The weights that lie in the package; None takes what ``zoo/weights`` holds under the name.

    Returns:
        A decorator that registers a builder and returns it.

    Raises:
        ConfigError: The name is taken or malformed, or the description is empty.
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
            shipped=shipped_checkpoints(name) if shipped is None else shipped,
        )
        MODELS.add(name, entry)
        return builder

    return add


def list_models(pattern: str = "") -> list[str]:
    """Return the names that match a shell-style pattern, sorted; all of them for an empty pattern."""
    return MODELS.matching(pattern)


def describe(name: str) -> ModelEntry:
    """Return the entry of a model.

    Raises:
        UnknownModelError: No such name; the message lists near matches.
    """
    return MODELS.find(name)


def checkpoint_path(entry: ModelEntry, checkpoint: str | Path) -> Path:
    """Return the file or folder behind the name of a shipped checkpoint, or behind a path.

    Dense weights are a file; a pruned model is a folder that :func:`madtp.save` wrote.

    Args:
        entry: Of the model, from :func:`describe`.
        checkpoint: The name of a shipped checkpoint, or a path.

    Raises:
        CheckpointError: It is neither a shipped name nor a file or such a folder, or a shipped file is damaged.
    """
    for shipped in entry.shipped:
        if shipped.name == checkpoint:
            return shipped.verified(entry.name)
    path = Path(checkpoint)
    if path.is_file() or (path / CONFIG).is_file():
        return path
    names = ", ".join(map(repr, entry.checkpoints)) or "none"
    raise CheckpointError(
        f"{str(checkpoint)!r} is neither a file, nor a saved folder, nor a shipped checkpoint of "
        f"{entry.name} (it has: {names})."
    )


def create(name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """Build a model, in eval mode. Its attribute ``zoo_name`` tells where it came from.

    Args:
        name: A name from :func:`list_models`.
        checkpoint: None for random weights; the name of a shipped checkpoint, ``dense`` or ``pruned-80`` say; a ``.pth`` or
            ``.safetensors`` file; or a folder that :func:`madtp.save` wrote.

    Returns:
        The model; a :class:`madtp.PrunedModel` where the checkpoint is that of a pruned one.

    Raises:
        UnknownModelError: No such model.
        CheckpointError: The checkpoint is missing, damaged, or belongs to another model.
    """
    entry = describe(name)
    path = None if checkpoint is None else checkpoint_path(entry, checkpoint)
    model = entry.builder().eval()
    object.__setattr__(model, "zoo_name", name)
    if path is None:
        return model
    if path.is_dir():
        import madtp  # which needs the compiler; dense models do without it

        return madtp.load(path, model)
    load_checkpoint(model, path)
    return model
