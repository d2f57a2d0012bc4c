"""Tensors from files: :func:`read_safetensors` reads them, and the others say whether a model can take them.

A model takes tensors that lie densely in memory, in a type that torch computes with, and whose values its own type can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from madtp.errors import CheckpointError
from madtp.files.limits import LONGEST_KEY

COMPUTED = frozenset(
    (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
)
"""The types of tensors that models hold. Narrower ones, such as the float8 types, only store values."""

_SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """What a safetensors file holds.

    Attributes:
        tensors: by name, on the CPU.
        metadata: texts by name.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]


def read_safetensors(path: Path, prefix: str = "") -> Stored:
    """Read a safetensors file.

    Args:
        path: the file.
        prefix: what the names of tensors start with that are read.

    Raises:
        CheckpointError: it is missing, damaged, or holds tensors of a type that models do not hold.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no mapping)
            stored = Stored({name: file.get_tensor(name) for name in names}, file.metadata() or {})
    except Exception as error:  # the library and torch raise whatever a broken header trips over
        raise CheckpointError(
            f"{path} is damaged or not a complete safetensors file ({type(error).__name__}: {error}); copy it again."
        ) from error
    check_kinds(str(path), stored.tensors)
    return stored


def check_kinds(owner: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that a model cannot take: sparse, quantised, without values, or of a type that only stores values.

    Args:
        owner: what holds them, for the message.
        tensors: by name.

    Raises:
        CheckpointError: there is such a tensor, or a name is too long.
    """
    if any(len(name) > LONGEST_KEY for name in tensors):
        raise CheckpointError(f"{owner} names a tensor with more than {LONGEST_KEY} characters; it is damaged.")
    odd = [f"{name} ({kind})" for name, value in tensors.items() if (kind := _odd_kind(value))]
    if odd:
        raise CheckpointError(
            f"{owner} holds {len(odd)} tensors that are not plain ones ({shorten(odd)}). Convert them to dense tensors of a "
            "type such as torch.bfloat16, with values, and save again."
        )


def check_values(owner: str, *, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Refuse values that copying would change, and different values for one tensor.

    Args:
        owner: what holds them, for the message.
        own: the state of the model that they are for.
        stored: values by the same names; some may lack.

    Raises:
        CheckpointError: there are such values.
    """
    for name, value in stored.items():
        dtype = own[name].dtype
        if kind_of(value.dtype) != kind_of(dtype) or overflows(value, dtype):
            raise CheckpointError(
                f"{owner} holds {name} as {value.dtype}, with values that the model's {dtype} cannot hold; pass a model of the "
                "type that was saved."
            )
    for names in tied_names(own).values():
        held = [name for name in names if name in stored]
        if any(stored[name] is not stored[held[0]] and not torch.equal(stored[name], stored[held[0]]) for name in held):
            raise CheckpointError(
                f"{owner} holds different values for {shorten(held)}, which are one tensor in the model; copy it again."
            )


def kind_of(dtype: torch.dtype) -> str:
    """Which numbers a type holds: "complex", "float" or "integer"."""
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "integer"


def overflows(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a value would leave the range of ``dtype`` when it is cast: a finite float becomes infinite, an integer wraps."""
    if value.is_floating_point() and dtype.is_floating_point:
        if torch.finfo(dtype).max >= torch.finfo(value.dtype).max:
            return False
        return bool((value.isfinite() & ~value.to(dtype).isfinite()).any())
    integers = not (value.is_floating_point() or value.is_complex() or dtype.is_floating_point or dtype.is_complex)
    if not integers or value.dtype == dtype or torch.bool in (value.dtype, dtype) or not value.numel():
        return False
    limits, wide = torch.iinfo(dtype), value.double()  # not every integer type has a minimum in torch
    return float(wide.min()) < limits.min or float(wide.max()) > limits.max


def tied_names(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each name of a model's state all names of the same tensor."""
    groups: dict[object, list[str]] = {}
    for key, value in own.items():
        identity = key if value.is_meta or not value.numel() else (value.data_ptr(), value.shape, value.stride())
        groups.setdefault(identity, []).append(key)
    return {key: keys for keys in groups.values() for key in keys}


def shorten(items: list[str]) -> str:
    """Return the first few of a list, for a message."""
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def _odd_kind(value: Tensor) -> str:
    """What is odd about a tensor; empty for a plain one."""
    if type(value) not in (Tensor, nn.Parameter):
        return type(value).__name__
    if value.is_quantized:
        return "quantised"
    if value.layout is not torch.strided:
        return str(value.layout).removeprefix("torch.")
    if value.is_meta:
        return "on the meta device"
    return "" if value.dtype in COMPUTED else str(value.dtype).removeprefix("torch.")
