"""Batches and outputs of any structure, taken apart and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from madtp.calls.compare import relative_difference


def leaves(output: Any) -> dict[str, Tensor]:
    """Tensors of an output structure by dotted path; objects that are no containers (caches) are left out."""
    return dict(_walk(output, ""))


def _walk(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        return
    for key, item in items:
        yield from _walk(item, f"{path}.{key}" if path else str(key))


def relative_error(expected: Mapping[Any, Tensor], actual: Mapping[Any, Tensor]) -> float:
    """Largest difference between outputs of the same name, relative to the largest finite value; infinite where shapes
    or integers differ."""
    worst = 0.0
    for key, want in expected.items():
        have = actual.get(key)
        if have is None or have.shape != want.shape:
            return float("inf")
        worst = max(worst, _difference(want, have))
    return worst


def _difference(want: Tensor, have: Tensor) -> float:
    if not want.numel():
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if torch.equal(want, have) else float("inf")
    return relative_difference(want, have)


def batched(inputs: Mapping[str, Any]) -> int | None:
    """The batch size that all tensors share, or None."""
    sizes = {value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def cut(inputs: Mapping[str, Any], row: int, size: int) -> dict[str, Any]:
    """The inputs of one sample of `size`, as a batch of one."""
    return {
        name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value
        for name, value in inputs.items()
    }


def repeated(inputs: Mapping[str, Any], size: int) -> dict[str, Any] | None:
    """A batch of `size` made of the samples of `inputs` in turn, or None where they share no batch size."""
    known = batched(inputs)
    if known is None:
        return None
    rows = torch.arange(size) % known
    return {name: value[rows] if isinstance(value, Tensor) and value.dim() else value for name, value in inputs.items()}
