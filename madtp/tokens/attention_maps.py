"""Attention maps that a model computes in its own way (by mixing heads, say): the steps along the keys.

Start at :func:`weigh`. Such a map stays as the model spells it. Only what runs along its keys has to know which slots hold
tokens: the softmax, a sum over the keys, and the product with the values. Padding slots take part in none of them.

Axis legend: B samples, H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp.tokens.state import TokenState


def shares(scores: Tensor, dtype: torch.dtype | None = None, state: TokenState | None = None) -> Tensor:
    """Return the softmax of ``[B, ..., K]`` over the keys of ``state``; zeros where a row sees no surviving key."""
    valid = _valid_along(scores, state)
    if valid is None:
        return scores.softmax(-1, dtype=dtype)
    scores = scores.masked_fill(~valid, float("-inf"))
    empty = scores.amax(-1, keepdim=True) == float("-inf")
    return scores.masked_fill(empty, 0).softmax(-1, dtype=dtype).masked_fill(empty, 0)


def total(weights: Tensor, keepdim: bool = False, state: TokenState | None = None) -> Tensor:
    """Return the sum of ``[B, ..., K]`` over the keys of ``state``."""
    valid = _valid_along(weights, state)
    return (weights if valid is None else weights.masked_fill(~valid, 0)).sum(-1, keepdim)


def weigh(weights: Tensor, values: Tensor, state: TokenState | None = None) -> Tensor:
    """Return ``weights [B, H, Q, K] @ values [B, H, K, D]`` over the keys of ``state``, ``[B, H, Q, D]``."""
    valid = _valid_along(weights, state)
    return (weights if valid is None else weights.masked_fill(~valid, 0)) @ values


def _valid_along(weights: Tensor, state: TokenState | None) -> Tensor | None:
    """Which keys hold tokens, broadcastable to ``weights [B, ..., K]``; None if all do. Heads may be folded into the batch."""
    if state is None or state.valid is None:
        return None
    valid = state.valid
    if weights.size(0) != valid.size(0):
        valid = valid.repeat_interleave(weights.size(0) // valid.size(0), 0)
    return valid.reshape(valid.size(0), *(1,) * (weights.dim() - 2), valid.size(1))
