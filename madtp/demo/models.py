"""The models that the demonstration compares, loaded from the weights inside the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from madtp.errors import CheckpointError
from madtp.pruned import PrunedModel

if TYPE_CHECKING:
    from zoo.blip.nlvr import BlipNlvr

MODEL = "blip_nlvr_mini"
DENSE = "dense"
PRUNED_PREFIX = "pruned-"


@dataclass(frozen=True)
class DenseEntry:
    """The dense model, with its name in the table."""

    name: str
    model: BlipNlvr


@dataclass(frozen=True)
class PrunedEntry:
    """A pruned model, with its name in the table."""

    name: str
    model: PrunedModel


Entry: TypeAlias = DenseEntry | PrunedEntry


def shipped_weights() -> Path:
    """Return the folder with the weights of the demonstration's model."""
    from zoo.registry import weights_folder

    return weights_folder(MODEL)


def load_models(folder: Path | None = None) -> list[Entry]:
    """Load the dense model, and then the pruned ones from the least to the most pruned.

    Args:
        folder: holds ``dense.safetensors`` and, for each pruned model, a folder such as ``pruned-50`` that ``madtp.save``
            wrote; ``None`` takes the shipped weights.

    Raises:
        CheckpointError: if the dense weights or all pruned models are missing, or if a file is damaged.
    """
    import madtp
    import zoo
    from zoo.blip.nlvr import BlipNlvr

    folder = shipped_weights() if folder is None else folder
    dense = folder / f"{DENSE}.safetensors"
    pruned = sorted(path for path in folder.glob(f"{PRUNED_PREFIX}*") if path.is_dir())
    if not dense.is_file() or not pruned:
        raise CheckpointError(
            f"{folder} holds no {'pruned models' if dense.is_file() else dense.name}; install the package again, or train "
            "the models with `madtp train` and `madtp compress`."
        )
    model = zoo.create(MODEL, dense)
    assert isinstance(model, BlipNlvr)
    entries: list[Entry] = [DenseEntry("dense", model)]
    for path in pruned:
        name = f"pruned −{path.name.removeprefix(PRUNED_PREFIX)}%"
        entries.append(PrunedEntry(name, madtp.load(path, zoo.create(MODEL)).eval()))
    return entries
