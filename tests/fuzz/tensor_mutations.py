"""Mutations of the tensors in a file that stays well-formed: other types, shapes, values, names. See :data:`TENSORS`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from zoo.checkpoints.pickles import LEGACY_PICKLES, check_pickle

from .json_mutations import HEADER_LENGTH
from .kinds import CHOICE, PLACE, Kind

DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16, torch.int32),
)
NUMBERS = (float("nan"), float("inf"), float("-inf"), 1e300, -1e39, 3e38, 0.0, -1.0, 1e-320, 70_000.0)
NAMES = (
    "",
    "a",
    "module.x",
    "madtp.x",
    "weight::scale",
    "optimiser.0.0.x",
    "optimiser.9.9.y",
    "optimiser.x",
    "b" * 2000,
    "é",
)

SHAPES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda value: value[None],
    lambda value: value[..., None],
    lambda value: value.flatten(),
    lambda value: value.reshape(value.shape[::-1]),
    lambda value: value[:0] if value.dim() else value,
    lambda value: value[:1] if value.dim() else value,
    lambda value: value.sum() if value.is_floating_point() else value,
    lambda value: torch.cat([value, value]) if value.dim() else value,
    lambda value: value.reshape(*[1] * 40, *value.shape),
)


@dataclass(frozen=True)
class _Opened:
    """The tensors of a file, and how they are written again."""

    tensors: dict[str, Tensor]
    write: Callable[[dict[str, Tensor]], bytes]


def _opened(content: bytes) -> _Opened | None:
    """Open the content of a file of safetensors or of PyTorch; None for what is damaged or something else."""
    for open_as in (_of_safetensors, _of_torch):
        try:
            return open_as(content)
        except Exception:  # after an earlier mutation, libraries raise whatever they trip over
            continue
    return None


def _of_safetensors(content: bytes) -> _Opened:
    end = HEADER_LENGTH + int.from_bytes(content[:HEADER_LENGTH], "little")
    metadata = json.loads(content[HEADER_LENGTH:end]).get("__metadata__")
    return _Opened(safetensors.torch.load(content), lambda tensors: safetensors.torch.save(tensors, metadata))


def _of_torch(content: bytes) -> _Opened:
    def write(tensors: dict[str, Tensor]) -> bytes:
        target = io.BytesIO()
        changed = {**held, "model": tensors} if "model" in held else tensors
        torch.save(changed, target, _use_new_zipfile_serialization=content[:2] == b"PK")
        return target.getvalue()

    end = 0
    for _ in range(0 if content[:2] == b"PK" else LEGACY_PICKLES):
        end = check_pickle(content, end)  # torch.load takes minutes for what some mutations have made
    held: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    found = held.get("model", held)
    if not all(isinstance(value, Tensor) for value in found.values()):
        raise TypeError("it holds no named tensors")
    return _Opened(dict(found), write)


def _changed(content: bytes, change: Callable[[dict[str, Tensor], list[str]], None]) -> bytes:
    opened = _opened(content)
    if opened is None or not opened.tensors:
        return content
    change(opened.tensors, sorted(opened.tensors))
    return opened.write({name: value.contiguous() for name, value in opened.tensors.items()})


def _replaced(content: bytes, place: int, new: Callable[[Tensor], Tensor]) -> bytes:
    def change(tensors: dict[str, Tensor], names: list[str]) -> None:
        name = names[place % len(names)]
        tensors[name] = new(tensors[name]).clone()

    return _changed(content, change)


@dataclass(frozen=True)
class Retype:
    place: int
    dtype: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return _replaced(content, self.place, lambda value: value.to(DTYPES[self.dtype % len(DTYPES)]))


@dataclass(frozen=True)
class Reshape:
    place: int
    shape: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return _replaced(content, self.place, SHAPES[self.shape % len(SHAPES)])


@dataclass(frozen=True)
class SetValueOf:
    """A number in the place of the first of a tensor; in double precision where it needs that."""

    place: int
    number: int
    wide: int

    def of(self, content: bytes, other: bytes) -> bytes:
        def new(value: Tensor) -> Tensor:
            value = value.double() if self.wide else value.clone()
            if value.is_floating_point() and value.numel():
                number = torch.tensor(NUMBERS[self.number % len(NUMBERS)], dtype=torch.float64)
                value.flatten()[0] = number.to(value.dtype)
            return value

        return _replaced(content, self.place, new)


@dataclass(frozen=True)
class RenameTensor:
    place: int
    name: int

    def of(self, content: bytes, other: bytes) -> bytes:
        def change(tensors: dict[str, Tensor], names: list[str]) -> None:
            known = (*NAMES, *(f"{name}::scale" for name in names), *names)
            tensors[known[self.name % len(known)]] = tensors.pop(names[self.place % len(names)])

        return _changed(content, change)


@dataclass(frozen=True)
class DropTensor:
    place: int

    def of(self, content: bytes, other: bytes) -> bytes:
        def change(tensors: dict[str, Tensor], names: list[str]) -> None:
            del tensors[names[self.place % len(names)]]

        return _changed(content, change)


@dataclass(frozen=True)
class CopyTensor:
    """A tensor under another's name, or under one more."""

    place: int
    name: int

    def of(self, content: bytes, other: bytes) -> bytes:
        def change(tensors: dict[str, Tensor], names: list[str]) -> None:
            known = (*NAMES, *names)
            tensors[known[self.name % len(known)]] = tensors[names[self.place % len(names)]].clone()

        return _changed(content, change)


TENSORS = (
    Kind(Retype, (CHOICE, CHOICE)),
    Kind(Reshape, (CHOICE, CHOICE)),
    Kind(SetValueOf, (CHOICE, CHOICE, CHOICE)),
    Kind(RenameTensor, (CHOICE, PLACE)),
    Kind(DropTensor, (CHOICE,)),
    Kind(CopyTensor, (CHOICE, PLACE)),
)
