"""Computing aside of what autograd saves: :func:`without_saved_tensors_hooks`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_saved_tensors_hooks() -> Iterator[None]:
    """Inside the block, hooks on saved tensors do not run, such as those that count them for a checkpoint.

    A checkpoint runs its content twice and expects the same number of saved tensors. What is built at the first run is not
    built at the second.
    """
    autograd = torch._C._autograd
    popped = []
    while (top := autograd._top_saved_tensors_default_hooks(False)) is not None:
        popped.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(popped):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
