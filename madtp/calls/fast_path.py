"""Torch's fused encoder layer, which hides a model's arithmetic from whoever traces or counts it: :func:`spelled_out`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def spelled_out() -> Iterator[None]:
    """Inside the block ``nn.TransformerEncoderLayer`` runs the operations that it is made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
