"""Read checkpoint files of other projects into zoo models, strictly. Start with :func:`load_checkpoint`.

Nothing in a file is executed, and a model is changed only after every key, shape and value has been checked.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import CheckpointError

PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
# Training scripts save the weights under one of these, beside optimiser state, epoch and the like.
WRAPPER_KEYS = ("model", "state_dict")
_SHOWN = 3


@dataclass(frozen=True)
class KeyTable:
    """How the keys of a file map to a model beyond equal names. A model class carries it as `checkpoint_table`.

    Patterns are shell-style. `ignored`: keys that a file may hold and the model does not want. `optional`: keys of the
    model that a file may lack. `position_grids`: position embeddings [1, 1 + side * side, C] (class token first) that
    are resized when the side differs.
    """

    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("madtp.*",)
    position_grids: tuple[str, ...] = ()


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a `.pth` or `.safetensors` file into a model, all or nothing.

    Raises:
        CheckpointError: the file is missing, truncated, unsafe, of another model or size, or holds NaN.
    """
    path = Path(path)
    table = getattr(model, "checkpoint_table", KeyTable())
    own = model.state_dict()
    found = {key: value for key, value in read_tensors(path).items() if not _matches(key, table.ignored)}
    _check_keys(path, model, own, found, table)
    for key in table.position_grids:
        found[key] = resize_position_grid(found[key], own[key].shape)
    _check_tensors(path, model, own, found)
    with torch.no_grad():
        for key, value in found.items():
            own[key].copy_(value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU, without the wrapper of a training script.

    Raises:
        CheckpointError: the file is missing, of unknown kind, truncated, unsafe, or holds no named tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}.")
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _unwrap(path, _read_pickle(path))
    kinds = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
    raise CheckpointError(f"{path} ends in {path.suffix!r}; a checkpoint ends in one of {kinds}.")


def resize_position_grid(embedding: Tensor, shape: torch.Size) -> Tensor:
    """Resize [1, 1 + m * m, C] to `shape` [1, 1 + n * n, C] by bicubic interpolation; the class token stays as it is.

    A tensor that is no such grid, or whose width differs, is returned unchanged, for the shape check to name.
    """
    if embedding.shape == shape or embedding.dim() != 3 or embedding.shape[-1] != shape[-1]:
        return embedding
    old, new = math.isqrt(embedding.shape[1] - 1), math.isqrt(shape[1] - 1)
    if old * old != embedding.shape[1] - 1:
        return embedding
    grid = embedding[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}); fetch it again.") from error


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects besides tensors and plain containers, which are refused since "
            "reading them can run code. Convert it to safetensors where you trust it."
        ) from error
    except Exception as error:  # torch.load raises whatever a broken archive or pickle stream trips over
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is truncated or no PyTorch file ({reason}); fetch it again.") from error


def _unwrap(path: Path, content: object) -> dict[str, Tensor]:
    for key in WRAPPER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors.")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} holds a {type(value).__name__} under {key!r} where a tensor belongs.")
    return {str(key): value for key, value in content.items()}


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def _check_keys(
    path: Path, model: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor], table: KeyTable
) -> None:
    missing = [key for key in own if key not in found and not _matches(key, table.optional)]
    unexpected = [key for key in found if key not in own]
    faults = [
        f"{len(keys)} {kind} ({_shorten(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if faults:
        raise CheckpointError(
            f"{path} is no checkpoint of this {type(model).__name__}: of {len(own)} keys {' and '.join(faults)}. "
            "Create the model that the file was saved from."
        )


def _check_tensors(path: Path, model: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    wrong_shape = [
        f"{key} is {list(value.shape)} in the file and {list(own[key].shape)} in the model"
        for key, value in found.items()
        if value.shape != own[key].shape
    ]
    if wrong_shape:
        raise CheckpointError(
            f"{path} is of another size than this {type(model).__name__}: {len(wrong_shape)} tensors differ "
            f"({_shorten(wrong_shape)}). Create the model with the sizes of the file."
        )
    wrong_kind = [key for key, value in found.items() if value.is_floating_point() != own[key].is_floating_point()]
    if wrong_kind:
        raise CheckpointError(f"{path} holds integers where {_shorten(wrong_kind)} needs floats, or the reverse.")
    not_finite = [key for key, value in found.items() if not torch.isfinite(value).all()]
    if not_finite:
        raise CheckpointError(
            f"{path} holds NaN or infinite values in {len(not_finite)} tensors ({_shorten(not_finite)}); "
            "its training diverged or the file is damaged."
        )
    if any(own[key].is_meta for key in found):
        raise CheckpointError(f"This {type(model).__name__} lies on the meta device; call to_empty(device=...) first.")
