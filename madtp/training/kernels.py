"""Attention kernels while training: :func:`for_gradients` around what is differentiated, :func:`without_gradients` within."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_ALL = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


def for_gradients(device: torch.device, low: bool) -> AbstractContextManager[Any]:
    """Kernels whose backward is fast, in bfloat16 if `low`.

    On a CPU the backward of the fused one takes two to fourteen times as long as that of matmul and softmax.
    """
    return sdpa_kernel(SDPBackend.MATH) if low and device.type == "cpu" else nullcontext()


@contextmanager
def without_gradients() -> Iterator[None]:
    """No gradients, and every kernel: the fused one of a CPU takes a third of the time."""
    with torch.no_grad(), sdpa_kernel(_ALL):
        yield
