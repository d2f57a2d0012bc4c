"""Tensors and arrays: what lets the same lines compute on the device, with gradients, and on the host.

On a CPU an array is a view of the tensor's memory, and numpy takes a third of torch's time for a step on a short vector. Code
for both uses operators, ``values.sum(1)[:, None]``, and the functions here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]
Values = TypeVar("Values", Tensor, Numbers)


def on_host(values: Tensor) -> Numbers:
    """Return the values of a tensor as an array; on a CPU a view of its memory, elsewhere the host waits for it."""
    if values.requires_grad:
        values = values.detach()
    if values.dtype == torch.bfloat16:  # which arrays do not have
        values = values.float()
    array: Numbers = values.cpu().numpy()
    return array


def namespace(values: Tensor | Numbers) -> ModuleType:
    """Return the module whose functions take these values: torch or numpy."""
    return torch if isinstance(values, Tensor) else np


def in_float32(values: Values) -> Values:
    """Return the values in float32."""
    return values.float() if isinstance(values, Tensor) else values.astype(np.float32, copy=False)


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for itself and float32 for all that is less precise."""
    return dtype if dtype == torch.float64 else torch.float32


def within(values: Values, inside: Values | None) -> Values:
    """Return the values, zero where ``inside`` is False; None stands for True throughout."""
    if inside is None:
        return values
    if isinstance(values, Tensor):
        return values.masked_fill(~inside, 0.0)
    return np.where(inside, values, np.float32(0.0))
