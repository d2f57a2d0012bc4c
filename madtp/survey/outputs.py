"""Tensors of batches and outputs of any structure: select, repeat and compare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from madtp.calls.compare import relative_difference


def output_tensors(output: object) -> dict[str, Tensor]:
    """Return the tensors of an output structure by dotted path.

    Objects that are not containers, such as caches, are left out.
    """
    return dict(_walk(output, ""))


def _walk(value: object, path: str) -> Iterator[tuple[str, Tensor]]:
    items: Iterable[tuple[object, object]]
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return
    for key, item in items:
        yield from _walk(item, f"{path}.{key}" if path else str(key))


def relative_error(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> float:
    """Return the largest :func:`tensor_error` of outputs with the same name; infinite if an expected one is missing."""
    return max(
        (tensor_error(want, actual[name]) if name in actual else float("inf") for name, want in expected.items()),
        default=0.0,
    )


def tensor_error(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest finite expected value.

    It is infinite where shapes or integers differ.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, actual) else float("inf")
    return relative_difference(expected, actual)


def batch_size(inputs: Mapping[str, object]) -> int | None:
    """Return the batch size that all tensors share, or ``None``."""
    sizes = {value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def take_sample(inputs: Mapping[str, object], row: int, size: int) -> dict[str, object]:
    """Return the inputs of one sample out of ``size``, as a batch of one."""
    return {
        name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value
        for name, value in inputs.items()
    }


def repeat_samples(inputs: Mapping[str, object], size: int) -> dict[str, object] | None:
    """Return a batch of ``size`` made of the samples in turn, or ``None`` if the tensors share no batch size."""
    known = batch_size(inputs)
    if known is None:
        return None
    rows = torch.arange(size) % known
    return {name: value[rows] if isinstance(value, Tensor) and value.dim() else value for name, value in inputs.items()}


def in_double_precision(inputs: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs in double precision."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
