"""Folders that a host's own ``save_pretrained`` writes, with what makes the model a pruned one again.

Start at :func:`describing`. The host's weight files hold what pruning adds, too, under its prefix; a further file describes the
rewrite. So the host's ``from_pretrained`` reads the original from such a folder, and :func:`madtp.load` the pruned model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madtp.atomic_files import write_text
from madtp.calls.call import Inputs
from madtp.errors import CheckpointError
from madtp.files.json_text import read_description
from madtp.files.limits import shown
from madtp.files.tensors import check_values, read_safetensors
from madtp.pruned import PrunedModel
from madtp.saving.rewriting_again import Settings, check_claims, description_of, rewritten_as
from madtp.sites.additions import PREFIX

DESCRIPTION = "madtp.json"
FORMAT = "madtp-pruned-host"
VERSION = 1


@contextmanager
def describing(pruned: PrunedModel, folder: str | Path) -> Iterator[None]:
    """Put the description of a pruned model into a folder that the host writes inside the block.

    It is there from the start, as a host may upload the folder at the end of the block.
    """
    path = Path(folder) / DESCRIPTION
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "version": VERSION, **description_of(pruned)}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    try:
        yield
    except BaseException:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            write_text(path, before)
        raise


def is_host_folder(folder: Path) -> bool:
    """Return whether a folder holds such a description."""
    return os.path.isfile(folder / DESCRIPTION)


def load_host_folder(folder: Path, model: nn.Module | None, example_inputs: Inputs | None) -> PrunedModel:
    """Read a pruned model from such a folder; see :func:`madtp.load`.

    Args:
        folder: the folder.
        model: the original with its weights, as the host's ``from_pretrained`` reads it from the folder.
        example_inputs: as for :func:`madtp.rewrite`. None makes inputs like those of the first rewrite.
    """
    settings = Settings.of(_read(folder / DESCRIPTION), str(folder / DESCRIPTION))
    if "class" not in settings.identity:
        raise CheckpointError(f"{folder / DESCRIPTION} is damaged: it names no class. Save the model again.")
    if model is None:
        name = str(settings.identity["class"]).rpartition(".")[2]
        raise CheckpointError(
            f"{folder} was written by save_pretrained of {name}; pass the model with its weights: "
            f"madtp.load(folder, {name}.from_pretrained(folder))."
        )
    stored = _additions(folder)
    check_claims(str(folder), settings, stored)
    pruned = rewritten_as(str(folder), model, settings, example_inputs)
    own = {name: value for name, value in pruned.state_dict().items() if name.startswith(f"{PREFIX}.")}
    faults = [name for name, value in own.items() if name not in stored or stored[name].shape != value.shape]
    if faults or any(bool(value.isnan().any()) for value in stored.values() if value.is_floating_point()):
        raise CheckpointError(
            f"the weight files in {folder} do not hold what pruning added to this {type(model).__name__} "
            f"({', '.join(faults[:3]) or 'it holds NaN'}); save the model again."
        )
    check_values(str(folder), own=own, stored={name: stored[name] for name in own})
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(stored[name])
    return pruned


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_description(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}); save the model again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a pruned model; save the model again.")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of format {shown(content.get('version'))}; this release reads {VERSION}. Upgrade madtp."
        )
    return content


def _additions(folder: Path) -> Mapping[str, Tensor]:
    """What pruning added, from all weight files of a folder."""
    paths = sorted(folder.glob("*.safetensors"))
    return {name: value for path in paths for name, value in read_safetensors(path, f"{PREFIX}.").tensors.items()}
