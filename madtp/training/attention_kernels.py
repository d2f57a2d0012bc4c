"""Which attention kernels training uses: :func:`training_kernels` around a loss, :func:`inference_kernels` within it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from madtp.programs.gradient_checkpointing import allowed_kernels

_outer_kernels: ContextVar[list[SDPBackend] | None] = ContextVar("kernels outside training_kernels", default=None)


@contextmanager
def training_kernels(device: torch.device, *, bfloat16: bool) -> Iterator[None]:
    """Select attention kernels with a fast backward.

    On a CPU in bfloat16, the backward of the fused kernel takes two to fourteen times as long as that of matmul and
    softmax. Elsewhere nothing changes.
    """
    if not (bfloat16 and device.type == "cpu"):
        yield
        return
    token = _outer_kernels.set(allowed_kernels())
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _outer_kernels.reset(token)


@contextmanager
def inference_kernels() -> Iterator[None]:
    """Disable gradients, and allow the kernels again that were allowed outside :func:`training_kernels`.

    Without a backward, the fused kernel of a CPU takes a third of the time.
    """
    kernels = _outer_kernels.get()
    with torch.no_grad(), nullcontext() if kernels is None else sdpa_kernel(kernels):
        yield
