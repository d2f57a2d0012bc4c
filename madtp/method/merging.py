"""Dropped tokens become one token, their importance-weighted mean (docs/method.md, "Merging").

Shapes: B samples, N tokens *with* class token and padding, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from madtp.method.importance import TINY


def merge_weights(scores: Tensor, dropped: Tensor) -> Tensor:
    """w_j = S_j / sum S over the dropped tokens; gradients reach S.

    Args:
        scores: S [B, N].
        dropped: [B, N] bool.

    Returns:
        [B, N] float32: sums to one over the dropped tokens, zero elsewhere, all zero where nothing is dropped. Equal
        weights where the scores of the dropped sum to zero.
    """
    weights = scores.float() * dropped
    total = weights.sum(dim=1, keepdim=True)
    usable = total.abs() > TINY
    shares = dropped / dropped.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.where(usable, weights / torch.where(usable, total, torch.ones_like(total)), shares)


def merged_token(tokens: Tensor, weights: Tensor) -> Tensor:
    """The merged token [B, 1, C] of tokens [B, N, C] and weights [B, N]; zero where the weights are."""
    return (weights.to(tokens.dtype).unsqueeze(1)) @ tokens


def merged_position(
    scores: Tensor, dropped: Tensor, valid: Tensor, rule: Literal["any", "best"] = "any"
) -> tuple[Tensor, Tensor]:
    """The position that the merged token stands for in masks and other side inputs, and whether attention may see it.

    Args:
        scores: S [B, N].
        dropped: [B, N] bool.
        valid: [B, N] bool, False on padding.
        rule: "any": the best-scored valid member, so valid if any member is; "best": the best-scored member, padding or
            not (the authors' code).

    Returns:
        Position [B] long (0 where nothing is dropped) and validity [B] bool (False where nothing is dropped).
    """
    members = dropped & valid if rule == "any" else dropped
    position = scores.float().masked_fill(~members, float("-inf")).argmax(dim=1)
    seen = valid & members
    return position, seen.gather(1, position.unsqueeze(1)).squeeze(1)
