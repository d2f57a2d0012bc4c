"""Training checkpoints: weights, optimiser and step, as safetensors and JSON, without pickle.

A checkpoint is a folder such as ``step-00001200``. It is written under another name and renamed when complete, so a folder
of that name is always whole. Random state is not stored, because every step seeds anew from its number. Start at
:func:`write_checkpoint`, :func:`read_checkpoint` and :func:`last_checkpoint`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from madtp.atomic_files import remove_folder, replacing_folder
from madtp.errors import CheckpointError

VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_TENSORS, _STATE = "tensors.safetensors", "state.json"


def write_checkpoint(
    folder: Path,
    step: int,
    module: nn.Module,
    *,
    optimisers: Sequence[Optimizer],
    extra: Mapping[str, object],
    keep: int,
) -> Path:
    """Write the state after ``step`` steps, and remove all but the last ``keep`` checkpoints.

    Args:
        folder: folder of all checkpoints of the run.
        step: number of steps done.
        module: module that is trained.
        optimisers: its optimisers.
        extra: further JSON values to store.
        keep: number of checkpoints that stay.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UnwritableError: the checkpoint cannot be written; those that are there stay.
    """
    target = folder / checkpoint_name(step)
    for left in folder.glob(".step-*"):  # of a run that was killed while it wrote
        shutil.rmtree(left)
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    groups: list[object] = []
    scalars: dict[str, object] = {}
    for which, optimiser in enumerate(optimisers):
        state = optimiser.state_dict()
        groups.append(state["param_groups"])
        for number, entry in state["state"].items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser.{which}.{number}.{name}"] = value
                else:
                    scalars[f"{which}.{number}.{name}"] = value
    # Clones: safetensors refuses tensors that share memory, and tied weights do.
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    content = {"version": VERSION, "step": step, "groups": groups, "scalars": scalars, "extra": dict(extra)}
    with replacing_folder(target) as draft:
        save_file(stored, draft / _TENSORS)
        (draft / _STATE).write_text(json.dumps(content, indent=1))
    for old in _checkpoints(folder)[:-keep]:
        remove_folder(old)
    return target


def read_checkpoint(path: Path, module: nn.Module, optimisers: Sequence[Optimizer]) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint into module and optimisers.

    Returns:
        The number of steps done, and the ``extra`` values given to :func:`write_checkpoint`.

    Raises:
        CheckpointError: if the checkpoint is damaged, newer than this code, or of another model.
    """
    try:
        content = json.loads((path / _STATE).read_text())
        tensors = load_file(path / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a complete training checkpoint ({error}); resume from an earlier one"
        ) from error
    if content.get("version", 0) > VERSION:
        raise CheckpointError(f"{path} has version {content['version']}, this code reads {VERSION}; upgrade madtp")
    weights = _below(tensors, "module.")
    own = module.state_dict()
    different = sorted(set(own) ^ set(weights))
    different += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if different:
        raise CheckpointError(
            f"{path} belongs to another model: {len(different)} tensors differ, the first is {different[0]!r}"
        )
    module.load_state_dict(weights)
    entries: list[dict[int, dict[str, object]]] = [{} for _ in optimisers]
    try:
        for name, value in [*_below(tensors, "optimiser.").items(), *content["scalars"].items()]:
            which, number, entry_name = name.split(".", 2)
            entries[int(which)].setdefault(int(number), {})[entry_name] = value
        for optimiser, state, groups in zip(optimisers, entries, content["groups"], strict=True):
            optimiser.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} was written with other optimisers than this run has ({error})") from error
    return content["step"], content["extra"]


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint below a folder, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
