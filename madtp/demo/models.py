"""The models that the demonstration compares, loaded from the weights inside the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from madtp.errors import CheckpointError

MODEL = "blip_nlvr_mini"
DENSE = "dense"
PRUNED_PREFIX = "pruned-"


@dataclass(frozen=True)
class Contender:
    """A model under its name in the table; `pruned` tells whether it is a :class:`madtp.PrunedModel`."""

    name: str
    model: nn.Module
    pruned: bool


def shipped_weights() -> Path:
    """The folder with the weights of the demonstration's model."""
    from zoo.registry import weights_folder

    return weights_folder(MODEL)


def load_contenders(folder: Path | None = None) -> list[Contender]:
    """The dense model, then the pruned ones from the least to the most pruned.

    `folder` holds `dense.safetensors` and one folder for each pruned model, `pruned-50` say, saved by `madtp.save`.

    Raises:
        CheckpointError: the dense weights or every pruned model are missing, or a file is damaged.
    """
    import madtp
    import zoo

    folder = shipped_weights() if folder is None else folder
    dense = folder / f"{DENSE}.safetensors"
    pruned = sorted(path for path in folder.glob(f"{PRUNED_PREFIX}*") if path.is_dir())
    if not dense.is_file() or not pruned:
        raise CheckpointError(
            f"{folder} holds no {'pruned models' if dense.is_file() else dense.name}; install the package again, or make "
            "them with `madtp train` and `madtp compress`."
        )
    contenders = [Contender("dense", zoo.create(MODEL, dense), pruned=False)]
    for path in pruned:
        name = f"pruned −{path.name.removeprefix(PRUNED_PREFIX)}%"
        contenders.append(Contender(name, madtp.load(path, zoo.create(MODEL)).eval(), pruned=True))
    return contenders
