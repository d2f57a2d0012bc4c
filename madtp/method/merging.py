"""The merged token: the importance-weighted mean of the dropped tokens.

Cao et al., CVPR 2024, module DTP; ``docs/method.md``, "Merging". Start at :func:`merged_token`.

Symbols: B samples, N tokens *with* class token and padding, C width of the residual stream, S ``[B, N]`` the importance.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from madtp.method.arrays import Values
from madtp.method.importance import TINY


def merge_weights(scores: Values, dropped: Values) -> Values:
    """Return the merge weights, w_j = S_j / sum of S over the dropped tokens. Gradients reach S.

    Where the importance of all dropped tokens sums to zero, they get equal weights; the authors' code divides by zero there.

    Args:
        scores: S ``[B, N]`` float32, a tensor or an array.
        dropped: ``[B, N]`` bool, of the same type.

    Returns:
        w ``[B, N]`` float32. It sums to one over the dropped tokens and is zero elsewhere, and zero throughout for a sample
        that drops nothing.
    """
    weights = (scores + TINY) * dropped
    total = weights.sum(1)[:, None]
    # Importance is negative under one option of the authors' code.
    shares: Values = weights / (total + (abs(total) < TINY))
    return shares


def merged_token(tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the merged token, sum_j w_j x_j.

    Args:
        tokens: x ``[B, N, C]``, the residual stream behind the self-attention's residual add.
        weights: w ``[B, N]`` from :func:`merge_weights`.

    Returns:
        ``[B, 1, C]``; zero for a sample that drops nothing.
    """
    return weights.to(tokens.dtype).unsqueeze(1) @ tokens


class MergedPosition(NamedTuple):
    """What stands for the merged token of each sample.

    Attributes:
        slot: ``[B]`` int64, the member whose entry in masks it takes.
        exists: ``[B]`` bool, whether the merged token is valid.
    """

    slot: Tensor
    exists: Tensor


def merged_position(
    scores: Tensor, dropped: Tensor, valid: Tensor, rule: Literal["any", "best"] = "any"
) -> MergedPosition:
    """Return which position stands for the merged token in masks, and whether the merged token is valid.

    Attention masks, position tables and the like have no entry for a merged token. It takes the entry of one of its members.

    Args:
        scores: S ``[B, N]``.
        dropped: ``[B, N]`` bool, the members of the merged token.
        valid: ``[B, N]`` bool, False on padding.
        rule: ``"any"``: the valid member of the highest importance, so that the merged token is valid if any member is.
            ``"best"``: the member of the highest importance, padding or not, as in the authors' code.

    Returns:
        Both are 0 and False where nothing is dropped.
    """
    members = dropped & valid if rule == "any" else dropped
    position = scores.float().masked_fill(~members, float("-inf")).argmax(dim=1)
    if rule == "any":
        return MergedPosition(position, members.any(dim=1))
    return MergedPosition(position, (valid & members).gather(1, position.unsqueeze(1)).squeeze(1))
