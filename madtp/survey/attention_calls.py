"""What attention a model computes, seen from the outside: how often, over how many sequences, of how many queries.

Start at :func:`traits`, which tells models with windows or a hierarchy of resolutions from others, whatever they are called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Attentions(TorchFunctionMode):
    """Sees what attention is made of while a model runs: fused calls, and softmax over rows of at least three axes.

    count: how many. sequences: the most that one ran over, where heads are not folded into them. queries: of each, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.sequences = 0
        self.queries: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        rows = args and isinstance(args[0], Tensor) and args[0].dim() > 2
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward") or (name == "softmax" and rows):
            self.count += 1
            if rows and name != "multi_head_attention_forward":
                self.queries.append(args[0].shape[-2])
                self.sequences = max(self.sequences, args[0].shape[0] if args[0].dim() > 3 else 1)
        return func(*args, **(kwargs or {}))


def traits(seen: Attentions, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of :data:`madtp.survey.record.TRAITS` that the calls of attention tell."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    found = ["windows"] if seen.sequences > max(map(_given, tensors), default=1) else []
    pictures = bool(tensors) and all(value.is_floating_point() and value.dim() > 3 for value in tensors)
    if pictures and any(_quarter(before, after) for before, after in pairwise(seen.queries)):
        found.append("hierarchy")
    return tuple(found)


def _given(value: Tensor) -> int:
    """Images or texts in an input: pictures ``[..., C, H, W]``, ids ``[..., T]``, features ``[B, N, C]``."""
    if not value.is_floating_point():
        return math.prod(value.shape[:-1])
    return math.prod(value.shape[:-3]) if value.dim() > 3 else value.shape[0]


def _quarter(before: int, after: int) -> bool:
    """Whether a grid was halved along both sides, class token or not."""
    return after > 1 and (before == 4 * after or before - 1 == 4 * (after - 1))
