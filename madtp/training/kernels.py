"""Attention kernels while training: :func:`for_gradients` around what is differentiated, :func:`without_gradients` within."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from madtp.programs.gradient_checkpointing import allowed_kernels

_outside: ContextVar[list[SDPBackend] | None] = ContextVar("kernels allowed around for_gradients", default=None)


@contextmanager
def for_gradients(device: torch.device, low: bool) -> Iterator[None]:
    """Kernels whose backward is fast, in bfloat16 if `low`.

    On a CPU the backward of the fused one takes two to fourteen times as long as that of matmul and softmax.
    """
    if not (low and device.type == "cpu"):
        yield
        return
    token = _outside.set(allowed_kernels())
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _outside.reset(token)


@contextmanager
def without_gradients() -> Iterator[None]:
    """No gradients, and the kernels that were allowed around :func:`for_gradients`: the fused one of a CPU takes a third of
    the time."""
    kernels = _outside.get()
    with torch.no_grad(), nullcontext() if kernels is None else sdpa_kernel(kernels):
        yield
