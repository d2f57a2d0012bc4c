"""Read checkpoint files of other projects into zoo models, strictly. Start with :func:`load_checkpoint`.

``files.py`` reads files, ``key_table.py`` says how keys map. Nothing in a file is executed, and a model is changed only
after every key, shape and value has been checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.atomic_files import replacing_file
from madtp.errors import CheckpointError
from madtp.files.tensors import kind_of, overflows, shorten, tied_names
from zoo.checkpoints.files import read_checkpoint
from zoo.checkpoints.key_table import KeyTable, choose, matches, translate


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's keys; ``str()`` is a line for people.

    Attributes:
        path: The file.
        format: The name of its :class:`~zoo.checkpoints.key_table.KeyTable`.
        loaded: How many tensors of the model got values.
        unused: Keys of the file that the model does not use.
        absent: Optional keys of the model that the file lacks.
        resized: Position embeddings that were resized, by the model's names.
    """

    path: Path
    format: str
    loaded: int
    unused: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.path}: format {self.format}, {self.loaded} tensors loaded"]
        for name in ("unused", "absent", "resized"):
            keys = list(getattr(self, name))
            if keys:
                parts.append(f"{len(keys)} {name} ({shorten(keys)})")
        return ", ".join(parts)


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Copy the weights of a checkpoint into a model, all or nothing.

    Args:
        model: Its class may list the formats that it reads as ``checkpoint_tables``.
        path: A ``.pth`` or ``.safetensors`` file, the index of a sharded checkpoint, a folder that holds one of these, or a
            TorchScript archive.

    Raises:
        CheckpointError: The file is missing, truncated, unsafe, of another model or size, or holds NaN.
    """
    path = Path(path)
    return load_tensors(model, read_checkpoint(path).tensors, path)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> LoadReport:
    """Do as :func:`load_checkpoint` with tensors that were read already; messages name ``path`` as their source."""
    table = choose(getattr(model, "checkpoint_tables", ()), tensors)
    own = model.state_dict()
    try:
        found = translate(tensors, table)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a checkpoint of this {type(model).__name__}: {error}") from error
    tied = tied_names(own)
    _check_keys(path, model, own, found, table, tied)
    resized = [key for key in table.position_grids if found[key].shape != own[key].shape]
    for key in resized:
        found[key] = resize_position_grid(found[key], own[key].shape)
    _check_tensors(path, model, own, found)
    _check_tied(path, found, tied)
    with torch.no_grad():
        for key, value in found.items():
            own[key].copy_(value)
    return LoadReport(
        path,
        table.name,
        len(found),
        tuple(key for key in tensors if matches(key, table.ignored)),
        tuple(key for key in own if key not in found and matches(key, table.optional)),
        tuple(resized),
    )


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write the weights of a model to a new ``.safetensors`` file, tied ones once, as :func:`load_checkpoint` takes them.

    Args:
        model: Any module.
        path: Of the new file.

    Raises:
        CheckpointError: The file exists, or cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists and is not overwritten; delete it or choose another name.")
    own = model.state_dict()
    tied = tied_names(own)
    kept = {key: value.detach().cpu().contiguous() for key, value in own.items() if key == tied[key][0]}
    with replacing_file(path) as draft:
        save_file(kept, draft)


def resize_position_grid(embedding: Tensor, shape: torch.Size) -> Tensor:
    """Resize ``[1, 1 + m * m, C]`` to ``shape`` ``[1, 1 + n * n, C]`` by bicubic interpolation; the class token stays as it is.

    Both may lack the first dimension. A tensor that is not such a grid, or whose width differs, is returned unchanged, for the
    shape check to name.
    """
    if embedding.dim() == 2 and len(shape) == 2:
        return resize_position_grid(embedding[None], torch.Size((1, *shape)))[0]
    if embedding.shape == shape or embedding.dim() != 3 or embedding.shape[-1] != shape[-1]:
        return embedding
    if embedding.shape[1] < 2 or shape[1] < 2 or not embedding.is_floating_point():
        return embedding
    old, new = math.isqrt(embedding.shape[1] - 1), math.isqrt(shape[1] - 1)
    if old * old != embedding.shape[1] - 1:
        return embedding
    grid = torch.unflatten(embedding[:, 1:].float(), 1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)


def _check_tied(path: Path, found: Mapping[str, Tensor], tied: Mapping[str, list[str]]) -> None:
    for key, value in found.items():
        first = next(twin for twin in tied[key] if twin in found)
        if not torch.equal(found[first], value):
            raise CheckpointError(
                f"{path} holds different values for {first} and {key}, which are one tensor in the model; it was trained "
                "with them apart."
            )


def _check_keys(
    path: Path,
    model: nn.Module,
    own: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    table: KeyTable,
    tied: Mapping[str, list[str]],
) -> None:
    missing = [key for key in own if not any(twin in found for twin in tied[key]) and not matches(key, table.optional)]
    unexpected = [key for key in found if key not in own]
    faults = [
        f"{len(keys)} {kind} ({shorten(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if faults:
        advice = "Create the model that the file was saved from."
        if any(key.startswith("madtp.") for key in unexpected):
            advice = "Its keys of madtp.* belong to a pruned model: use madtp.load for the folder."
        raise CheckpointError(
            f"{path} is not a checkpoint of this {type(model).__name__}: of {len(own)} keys {' and '.join(faults)}. {advice}"
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
            f"({shorten(wrong_shape)}). Create the model with the sizes of the file."
        )
    wrong_kind = [key for key, value in found.items() if kind_of(value.dtype) != kind_of(own[key].dtype)]
    if wrong_kind:
        raise CheckpointError(
            f"{path} holds integers or complex numbers where {shorten(wrong_kind)} needs floats, or the reverse."
        )
    not_finite = [key for key, value in found.items() if not torch.isfinite(value).all()]
    if not_finite:
        raise CheckpointError(
            f"{path} holds NaN or infinite values in {len(not_finite)} tensors ({shorten(not_finite)}); "
            "its training diverged or the file is damaged."
        )
    too_large = [key for key, value in found.items() if overflows(value, own[key].dtype)]
    if too_large:
        key = too_large[0]
        raise CheckpointError(
            f"{path} holds values that the model cannot hold in {len(too_large)} tensors ({shorten(too_large)}): {key} is "
            f"{found[key].dtype} in the file and {own[key].dtype} in the model. Create the model in the type of the file."
        )
    if any(own[key].is_meta for key in found):
        raise CheckpointError(f"This {type(model).__name__} lies on the meta device; call to_empty(device=...) first.")
