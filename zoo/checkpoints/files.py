"""Reads checkpoint files of every kind as named tensors. Start with :func:`read_checkpoint`.

safetensors (whole, or sharded with an index), PyTorch's ``.pth``, and TorchScript archives. Nothing in a file is executed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from madtp.errors import CheckpointError
from madtp.files.json_text import read_description
from madtp.files.limits import FREE_BYTES, check_bytes, is_file_name, shown
from madtp.files.tensors import check_kinds, read_safetensors
from madtp.saving.eight_bit import unpack
from zoo.checkpoints.pickles import check_file
from zoo.checkpoints.torchscript import is_torchscript, read_torchscript

PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"
# What transformers and madtp call the file in a folder, most preferred first.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Training scripts save the weights under one of these, next to optimiser state, epoch and the like.
WRAPPER_KEYS = ("model", "state_dict")


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        tensors: By name, on the CPU.
        settings: Numbers that a training script stored next to the tensors, by name.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, float] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Content:
    """Return the content of a checkpoint file, of a sharded one (by its index), or of a folder that holds one.

    Matrices that are stored in eight bits (:mod:`madtp.saving.eight_bit`) come as float32.

    Raises:
        CheckpointError: It is missing, of unknown kind, truncated, unsafe, or holds no named tensors.
    """
    if os.path.isdir(path):  # the methods of Path raise where a name is too long
        path = _in_folder(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"There is no checkpoint file {path}.")
    return _read_sharded(path) if path.name.endswith(INDEX_SUFFIX) else _read_file(path)


def _read_file(path: Path) -> Content:
    if path.suffix == SAFETENSORS_SUFFIX:
        return Content(_unpacked(path, read_safetensors(path).tensors))
    if path.suffix in PICKLE_SUFFIXES:
        return Content(read_torchscript(path)) if is_torchscript(path) else _read_pickle(path)
    kinds = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, INDEX_SUFFIX))
    raise CheckpointError(f"{path} ends in {path.suffix!r}; a checkpoint ends in one of {kinds}.")


def _in_folder(folder: Path) -> Path:
    present = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    if not present:
        raise CheckpointError(f"The folder {folder} holds no checkpoint; looked for {', '.join(FOLDER_FILES)}.")
    return present[0]


def _read_sharded(index: Path) -> Content:
    try:
        wanted: dict[str, object] = dict(read_description(index)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not the index of a sharded checkpoint ({type(error).__name__}: {error})."
        ) from error
    tensors: dict[str, Tensor] = {}
    odd = [name for name in wanted.values() if not is_file_name(name) or name.endswith(INDEX_SUFFIX)]
    if odd:
        raise CheckpointError(f"{index} names {shown(odd[0])}, which is not a file in its folder.")
    for shard in sorted(map(str, set(wanted.values()))):
        path = index.parent / shard
        if not os.path.isfile(path):
            raise CheckpointError(f"There is no checkpoint file {path}, which {index.name} names.")
        found = _read_file(path).tensors
        keys = {key for key, place in wanted.items() if place == shard}
        if keys != found.keys():
            differing = sorted(keys ^ found.keys())
            raise CheckpointError(
                f"{path} does not hold what {index.name} says: {len(differing)} keys differ "
                f"({', '.join(differing[:3])}); fetch both again."
            )
        tensors.update(found)
    return Content(tensors)


def _unpacked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return unpack(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def _read_pickle(path: Path) -> Content:
    try:
        held = check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects besides tensors and plain containers, which are refused since "
            "reading them can run code. Convert it to safetensors where you trust it."
        ) from error
    except Exception as error:  # torch.load raises whatever a broken archive or pickle stream trips over
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is truncated or not a PyTorch file ({reason}); fetch it again.") from error
    found = _unwrap(path, content)
    check_kinds(str(path), found.tensors)
    try:
        for name, value in found.tensors.items():
            check_bytes(name, value.nbytes, max(FREE_BYTES, held))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    return found


def _unwrap(path: Path, content: object) -> Content:
    settings: dict[str, float] = {}
    for key in WRAPPER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            settings.update({str(name): float(x) for name, x in content.items() if _is_number(x)})
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors.")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} holds a {type(value).__name__} under {shown(key)} where a tensor belongs.")
    return Content({str(key): value for key, value in content.items()}, settings)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
