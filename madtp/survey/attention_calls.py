"""The attention that a model computes, seen from outside: how often, over how many sequences, of how many queries.

Start at :func:`traits`. It tells models with windows or with a hierarchy of resolutions from others, whatever their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionCalls(TorchFunctionMode):
    """Records the attention of a model that runs inside it: fused calls, and softmax over tensors of at least three axes.

    Attributes:
        count: number of attentions.
        sequences: largest number of sequences in one of them, where heads are not folded into the batch.
        queries: number of queries of each, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.sequences = 0
        self.queries: list[int] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Count the call if it is an attention, and run it."""
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        rows = first.shape if isinstance(first, Tensor) and first.dim() > 2 else None
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward") or (name == "softmax" and rows):
            self.count += 1
            if rows and name != "multi_head_attention_forward":
                self.queries.append(rows[-2])
                self.sequences = max(self.sequences, rows[0] if len(rows) > 3 else 1)
        return func(*args, **(kwargs or {}))


def traits(calls: AttentionCalls, inputs: Mapping[str, object]) -> tuple[str, ...]:
    """Return the traits, out of :data:`madtp.survey.record.TRAITS`, that the attention calls show.

    Args:
        calls: attention of one run of the model.
        inputs: arguments of that run.
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    found = ["windows"] if calls.sequences > max(map(_sequences_in, tensors), default=1) else []
    images_only = bool(tensors) and all(value.is_floating_point() and value.dim() > 3 for value in tensors)
    if images_only and any(_falls_to_a_quarter(before, after) for before, after in pairwise(calls.queries)):
        found.append("hierarchy")
    return tuple(found)


def _sequences_in(value: Tensor) -> int:
    """Number of images or texts in an input: images ``[..., C, H, W]``, ids ``[..., T]``, features ``[B, N, C]``."""
    if not value.is_floating_point():
        return math.prod(value.shape[:-1])
    return math.prod(value.shape[:-3]) if value.dim() > 3 else value.shape[0]


def _falls_to_a_quarter(before: int, after: int) -> bool:
    """Whether a grid was halved along both sides, with or without a class token."""
    return after > 1 and (before == 4 * after or before - 1 == 4 * (after - 1))
