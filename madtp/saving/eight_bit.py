"""Matrices in eight bits a value, with a scale for each row: :func:`pack` and :func:`unpack`.

A row ``w`` of a matrix (all weights of one output) is stored as the whole numbers ``round((w - b) / s)`` from -127 to 127,
where ``s = max |w - b| / 127``. The base ``b`` is zero, or the same row of a model that the weights were trained from: the
smaller the difference, the finer the rounding. Packed tensors keep their names; the scales of ``NAME`` are stored as
``NAME::scale``, float32 ``[rows]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from madtp.errors import CheckpointError

SCALE = "::scale"
LARGEST = 127


def pack(
    tensors: Mapping[str, Tensor], chosen: Callable[[str, Tensor], bool], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Store the chosen tensors in eight bits and leave the others as they are.

    Args:
        tensors: By name. Names that share a tensor share the packed one.
        chosen: Which of them to pack, from name and value: floating-point tensors ``[rows, ...]``.
        base: Tensors to store the difference from, by name; the others are stored whole.
    """
    packed: dict[str, Tensor] = {}
    done: dict[tuple[int, torch.Size, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
    for name, value in tensors.items():
        if not chosen(name, value):
            packed[name] = value
            continue
        key = value.data_ptr(), value.shape, value.stride()
        if key not in done:
            whole = value.detach().float()
            done[key] = _packed(whole - base[name].float() if base is not None and name in base else whole)
        packed[name], packed[name + SCALE] = done[key]
    return packed


def unpack(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what :func:`pack` was given, the packed tensors rounded and in float32; ``base`` as there.

    Raises:
        CheckpointError: scales, or a tensor of the base, do not fit.
    """
    unpacked: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors:
            continue
        if name + SCALE not in tensors:
            unpacked[name] = value
            continue
        if value.data_ptr() not in done:
            _check_fit(name, value, tensors[name + SCALE], None if base is None else base.get(name))
            rows = value.float().flatten(1) * tensors[name + SCALE][:, None]
            whole = rows.view(value.shape)
            done[value.data_ptr()] = whole + base[name].float() if base is not None and name in base else whole
        unpacked[name] = done[value.data_ptr()]
    return unpacked


def _check_fit(name: str, value: Tensor, scale: Tensor, base: Tensor | None) -> None:
    """Refuse what could not be multiplied and added, or only after one of both is made larger."""
    if value.dtype != torch.int8 or value.dim() < 2 or scale.shape != value.shape[:1] or not scale.is_floating_point():
        raise CheckpointError(
            f"{name} is {_kind(value)} with scales that are {_kind(scale)}, not a matrix of int8 with a scale for each row"
        )
    if base is not None and base.shape != value.shape:
        raise CheckpointError(f"{name} is {_kind(value)}, and the tensor that it differs from is {_kind(base)}")


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _packed(value: Tensor) -> tuple[Tensor, Tensor]:
    rows = value.flatten(1)
    scale = rows.abs().amax(dim=1) / LARGEST
    whole = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
    return whole.to(torch.int8).view(value.shape), scale
