"""Checkpoints of the MADTP authors' code as pruned models. Start with :func:`load_official`.

Such a file holds the model under its published names and the alignment tokens (their code book), for CLIP also a linear layer
in front of these at every block. The temperature that training ended with is stored next to the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import madtp
from madtp.errors import CheckpointError
from madtp.files.tensors import check_values
from zoo.checkpoints.files import read_checkpoint
from zoo.checkpoints.key_table import KeyTable, Row, matches, translate
from zoo.checkpoints.loading import LoadReport, load_tensors

ALIGNMENT = "madtp.alignment.tokens"
TEMPERATURE = "temperature"


@dataclasses.dataclass(frozen=True)
class Official:
    """A pruned model that behaves as the authors' code does.

    Attributes:
        pruned: The model.
        report: What became of the keys of the file.
    """

    pruned: madtp.PrunedModel
    report: LoadReport


def load_official(model: nn.Module, path: str | Path) -> Official:
    """Load a checkpoint of the authors' code into a model of the zoo, and rewrite it as their code prunes.

    Args:
        model: A dense model; its weights are replaced, and the result shares them. The ``pruning_rows`` of its class say
            where the authors' additions belong.
        path: The file.

    Raises:
        CheckpointError: The file is not a complete checkpoint of the authors' code for this model.
    """
    path = Path(path)
    content = read_checkpoint(path)
    rows: tuple[Row, ...] = getattr(model, "pruning_rows", ())
    sources = [source for row in rows for source in row.sources]
    theirs = {key: value for key, value in content.tensors.items() if matches(key, sources)}
    # A row serves its own keys only, while a pattern also fits what stands in front of them.
    added = {key: value for key, value in translate(theirs, KeyTable(rows=rows)).items() if key.startswith("madtp.")}
    temperature = content.settings.get(TEMPERATURE)
    if ALIGNMENT not in added or temperature is None:
        absent = "no alignment tokens" if ALIGNMENT not in added else "no temperature beside the weights"
        raise CheckpointError(
            f"{path} holds {absent}, so it is not a checkpoint of the MADTP authors' code for {type(model).__name__}. For a "
            "dense model use zoo.load_checkpoint."
        )
    if added[ALIGNMENT].dim() != 2:
        raise CheckpointError(
            f"{path}: the alignment tokens have the shape {list(added[ALIGNMENT].shape)}, not [K, d_e]."
        )
    report = load_tensors(model, content.tensors, path)
    count, width = added[ALIGNMENT].shape
    config = dataclasses.replace(
        madtp.PruningConfig.official(temperature=temperature),
        alignment_tokens=count,
        alignment_width=width,
        query_projection="always" if len(added) > 1 else "differing",
    )
    pruned = madtp.rewrite(model, config=config)
    _copy(path, type(model).__name__, pruned, added)
    unused = tuple(key for key in report.unused if key not in theirs)
    return Official(pruned, dataclasses.replace(report, loaded=report.loaded + len(added), unused=unused))


def _copy(path: Path, name: str, pruned: nn.Module, added: Mapping[str, Tensor]) -> None:
    own = {key: value for key, value in pruned.state_dict().items() if key.startswith("madtp.")}
    differing = sorted(own.keys() ^ added.keys())
    if differing:
        raise CheckpointError(
            f"{path} does not fit the pruning of {name}: {len(differing)} keys are in one of both only "
            f"({', '.join(differing[:3])})."
        )
    for key, value in added.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{path}: {key} is {list(value.shape)} in the file and {list(own[key].shape)} in the model."
            )
    check_values(str(path), own=own, stored=added)
    with torch.no_grad():
        for key, value in added.items():
            own[key].copy_(value)
