"""Rewriting inside ``torch.inference_mode``: :func:`outside_inference_mode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from madtp.calls.call import Call


@contextmanager
def outside_inference_mode(call: Call) -> Iterator[Call]:
    """Leave inference mode inside the block: what is made there can be trained later.

    Args:
        call: a call of the model.

    Returns:
        The call with ordinary tensors.
    """
    if not torch.is_inference_mode_enabled():
        yield call
        return
    with torch.inference_mode(False), torch.no_grad():
        yield call.with_leaves(
            [leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf for leaf in call.flat()[0]]
        )
