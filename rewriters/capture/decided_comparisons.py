"""Arguments that are comparisons of sizes, such as ``is_causal=q.shape[-2] > 1``, decided while a model is traced.

Start at :func:`decided_comparisons`. While sizes are free such a comparison is a symbol, which attention refuses. To decide it
limits the sizes that the capture serves, as an ``if`` on it would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def decided_comparisons() -> Iterator[None]:
    """Give attention a bool where it is given a comparison of sizes, inside the block."""
    original = F.scaled_dot_product_attention

    def deciding(*args: Any, **kwargs: Any) -> Tensor:
        return original(*map(_decided, args), **{name: _decided(value) for name, value in kwargs.items()})

    # The function itself reads its arguments before any mode of torch could change them.
    F.scaled_dot_product_attention = deciding
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _decided(value: Any) -> Any:
    return bool(value) if isinstance(value, torch.SymBool) else value
