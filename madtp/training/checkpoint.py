"""Training checkpoints: weights, optimiser, step and config, as safetensors and JSON, without pickle.

A checkpoint is a folder such as ``step-00001200``. It is written under another name and renamed when complete, so a folder
of that name is always whole; hashes of its files tell whether it still is. Random state is not stored, because every step
seeds anew from its number. Start at :func:`write_checkpoint` and :func:`open_checkpoint`; ``resuming.py`` chooses the
checkpoint to go on from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from madtp.atomic_files import remove_folder, replacing_folder
from madtp.errors import CheckpointError
from madtp.files.json_text import read_description
from madtp.files.limits import count, finite, shown
from madtp.files.tensors import check_values, read_safetensors
from madtp.saving.model_folder import sha256_of

VERSION = 2
_NAME = re.compile(r"step-(\d{8})")
_TENSORS, _STATE, _HASHES = "tensors.safetensors", "state.json", "hashes.json"
_HASHED_SINCE = 2
_MODULE, _OPTIMISER = "module.", re.compile(r"optimiser\.(\d{1,9})\.(\d{1,9})\.(.+)")
_STEP = "step"
"""What optimisers of torch call the only value of a parameter that is not of its shape."""


class DamagedCheckpointError(CheckpointError):
    """A training checkpoint is not what was written; an earlier one may be whole."""


@dataclass(frozen=True)
class Trained:
    """What training changes, and checkpoints hold.

    Attributes:
        module: the module that is trained.
        optimisers: its optimisers.
    """

    module: nn.Module
    optimisers: Sequence[Optimizer]

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, buffers and the tensors of the optimisers by the names that they have in a file."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        return tensors | {name: value for name, value in self._optimiser_values().items() if isinstance(value, Tensor)}

    def scalars(self) -> dict[str, object]:
        """Return everything else that the optimisers keep."""
        return {name: value for name, value in self._optimiser_values().items() if not isinstance(value, Tensor)}

    def layout(self) -> list[list[int]]:
        """Return the number of parameters in each group of each optimiser."""
        return [[len(group["params"]) for group in optimiser.param_groups] for optimiser in self.optimisers]

    def _optimiser_values(self) -> dict[str, object]:
        return {
            f"optimiser.{which}.{number}.{name}": value
            for which, optimiser in enumerate(self.optimisers)
            for number, entry in optimiser.state_dict()["state"].items()
            for name, value in entry.items()
        }


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinite values."""
    return [
        name for name, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]


def write_checkpoint(
    folder: Path, step: int, trained: Trained, *, extra: Mapping[str, object], config: Mapping[str, object], keep: int
) -> Path:
    """Write the state after ``step`` steps, and remove all but the last ``keep`` checkpoints.

    Those of later steps are removed, too: the run did not go on from them, because they are damaged.

    Args:
        folder: folder of all checkpoints of the run.
        step: number of steps done.
        trained: what is trained.
        extra: further JSON values to store.
        config: what the run depends on, in JSON values.
        keep: number of checkpoints that stay.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UnwritableError: the checkpoint cannot be written; those that are there stay.
    """
    target = folder / checkpoint_name(step)
    for left in folder.glob(".step-*"):  # of a run that was killed while it wrote
        shutil.rmtree(left)
    # Clones: safetensors refuses tensors that share memory, and tied weights do.
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in trained.tensors().items()}
    content = {
        "version": VERSION,
        "step": step,
        "optimisers": trained.layout(),
        "scalars": trained.scalars(),
        "extra": dict(extra),
        "config": dict(config),
    }
    with replacing_folder(target) as draft:
        save_file(stored, draft / _TENSORS)
        (draft / _STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        hashes = {name: sha256_of(draft / name) for name in (_TENSORS, _STATE)}
        (draft / _HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    found = checkpoints(folder)
    here = found.index(target)
    for old in [*found[: max(0, here + 1 - keep)], *found[here + 1 :]]:
        remove_folder(old)
    return target


@dataclass(frozen=True)
class Stored:
    """A checkpoint that was read and found whole.

    Attributes:
        path: its folder.
        step: number of steps done.
        extra: the values given to :func:`write_checkpoint`.
        config: those that the run depended on; None in checkpoints of older versions.
        tensors: by name, on the CPU.
        scalars: values of the optimisers that are no tensors.
        layout: see :meth:`Trained.layout`; None in checkpoints of older versions.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    config: dict[str, Any] | None
    tensors: dict[str, Tensor]
    scalars: dict[str, object]
    layout: list[list[int]] | None

    def load_into(self, trained: Trained) -> None:
        """Load weights and the state of the optimisers, all or nothing. Learning rates and the like stay as they are.

        Raises:
            CheckpointError: the checkpoint is of another model or of other optimisers.
        """
        weights = {name.removeprefix(_MODULE): x for name, x in self.tensors.items() if name.startswith(_MODULE)}
        own = trained.module.state_dict()
        different = sorted(set(own) ^ set(weights))
        different += [name for name in own if name in weights and own[name].shape != weights[name].shape]
        if different:
            raise CheckpointError(
                f"{self.path} belongs to another model: {len(different)} tensors differ, the first is {different[0]!r}"
            )
        check_values(str(self.path), own=own, stored=weights)
        states = self._optimiser_states(trained)
        trained.module.load_state_dict(weights)
        for optimiser, state in zip(trained.optimisers, states, strict=True):
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})

    def _optimiser_states(self, trained: Trained) -> list[dict[int, dict[str, object]]]:
        parameters = [[p for group in one.param_groups for p in group["params"]] for one in trained.optimisers]
        states: list[dict[int, dict[str, object]]] = [{} for _ in parameters]
        try:
            if self.layout is not None and self.layout != trained.layout():
                raise ValueError(f"{self.layout} parameters in their groups, not {trained.layout()}")
            for full_name, value in [*self.tensors.items(), *self.scalars.items()]:
                if full_name.startswith(_MODULE):
                    continue
                which, number, name = _parts(full_name)
                of = parameters[which][number]
                _check_state(full_name, name, value, of)
                states[which].setdefault(number, {})[name] = value
            for state in states:
                if any(one.keys() != next(iter(state.values())).keys() for one in state.values()):
                    raise ValueError("not the same values for each parameter")
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"{self.path} was written with other optimisers than this run has ({error})"
            ) from error
        return states


def open_checkpoint(path: Path) -> Stored:
    """Read a checkpoint and check every byte.

    Raises:
        DamagedCheckpointError: it is incomplete, its content has changed, or it holds NaN.
        CheckpointError: it is newer than this code.
    """
    try:
        content = read_description(path / _STATE)
        version = count(content["version"], "its version", low=1)
        if version <= VERSION:
            if version >= _HASHED_SINCE or (path / _HASHES).exists():
                _check_hashes(path)
            stored = _parsed(path, content, _tensors(path / _TENSORS))
    # Whatever nonsense a damaged file holds in place of a number or a table.
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if version > VERSION:
        raise CheckpointError(f"{path} has version {version}, this code reads {VERSION}; upgrade madtp")
    if stored.step != int(path.name.removeprefix("step-")):
        raise DamagedCheckpointError(f"{path} is damaged (it holds step {stored.step})")
    return stored


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_safetensors(path).tensors
    except CheckpointError as error:
        raise DamagedCheckpointError(str(error)) from error


def _parts(name: str) -> tuple[int, int, str]:
    """Which optimiser and which parameter a value belongs to, and its name there."""
    found = _OPTIMISER.fullmatch(name)
    if found is None:
        raise ValueError(f"a value with the name {shown(name)}")
    return int(found[1]), int(found[2]), found[3]


def _check_state(full_name: str, name: str, value: object, of: Tensor) -> None:
    """Refuse what an optimiser cannot go on from."""
    if not isinstance(value, Tensor):
        finite(value, full_name)
        return
    wanted = torch.Size() if name == _STEP else of.shape
    if value.shape != wanted or not value.is_floating_point():
        raise ValueError(f"{full_name} is {value.dtype} {list(value.shape)} for a parameter {list(of.shape)}")
    if name == _STEP and value < 0:
        raise ValueError(f"{full_name} is {float(value)}")


def _check_hashes(path: Path) -> None:
    hashes = read_description(path / _HASHES)
    for name in (_TENSORS, _STATE):
        if sha256_of(path / name) != hashes[name]:
            raise ValueError(f"the content of {name} does not match its hash")


def _parsed(path: Path, content: Mapping[str, Any], tensors: dict[str, Tensor]) -> Stored:
    config, layout = content.get("config"), content.get("optimisers")
    return Stored(
        path,
        step=count(content["step"], "its step"),
        extra=dict(content["extra"]),
        config=None if config is None else dict(config),
        tensors=tensors,
        scalars={
            name if name.startswith("optimiser.") else f"optimiser.{name}": value
            for name, value in dict(content["scalars"]).items()
        },
        layout=None if layout is None else [[count(size, "a size") for size in groups] for groups in layout],
    )


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints below a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
