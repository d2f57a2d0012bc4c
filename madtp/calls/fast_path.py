"""Torch's fused encoder layer, which hides the operations of a model from tracing and counting: :func:`spelled_out`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def spelled_out() -> Iterator[None]:
    """Let ``nn.TransformerEncoderLayer`` run its single operations, not its fused kernel, inside the block."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
