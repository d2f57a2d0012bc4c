"""Which tokens pruning may take, and in which order survivors stand: :func:`candidates_of` and :func:`survivor_order`.

Cao et al., CVPR 2024, module DTP; ``docs/method.md``, "Who survives". ``selectors.py`` decides who survives.

Symbols: B samples, N tokens *with* class token and padding, S ``[B, N]`` the importance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from madtp.config import PruningConfig


def candidates_of(valid: Tensor, protected: Tensor, config: PruningConfig) -> Tensor:
    """Return the candidates, the tokens that pruning may take.

    By default padding is not a candidate, and it is dropped first: it survives only where it is protected, because a readout
    at the last position may read it. The authors' code treats padding like any token (``padding="scored"``).

    Args:
        valid: ``[B, N]`` bool, False on padding.
        protected: ``[B, N]`` bool, the class token and other readouts.
        config: the field ``padding`` is read.

    Returns:
        ``[B, N]`` bool.
    """
    return ~protected if config.padding == "scored" else valid & ~protected


def survivor_order(
    survivors: Tensor, scores: Tensor, candidates: Tensor, rule: Literal["position", "topk"] = "position"
) -> Tensor:
    """Return the order of survivors in the pruned stream; the merged token follows them.

    Args:
        survivors: ``[B, N]`` bool, protected tokens included.
        scores: S ``[B, N]``.
        candidates: ``[B, N]`` bool.
        rule: ``"position"`` keeps the original order. ``"topk"`` puts protected tokens first and the others in the accidental
            order in which ``torch.topk(sorted=False)`` returns them, as the authors' code does.

    Returns:
        ``[B, N]`` int64, a permutation of the positions with the survivors first.
    """
    by_position = survivors.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    if rule == "position":
        return by_position
    rows = []
    for keep, score, candidate, fallback in zip(survivors, scores.float(), candidates, by_position, strict=True):
        inside = candidate.nonzero().squeeze(1)
        count = int((keep & candidate).sum())
        best = inside[score[inside].topk(count, sorted=False).indices]
        if not bool(keep[best].all()):
            best = inside[score[inside].masked_fill(~keep[inside], float("-inf")).topk(count, sorted=False).indices]
        protected = (keep & ~candidate).nonzero().squeeze(1)
        rows.append(torch.cat([protected, best, fallback[int(keep.sum()) :]]))
    return torch.stack(rows)


def sorted_positions(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return where the authors' code reads the attention mask after pruning (``mask_order="sorted"``).

    It reads the mask at the protected tokens, then at the ``count`` best candidates and the next one by falling importance,
    whatever the order of the tokens. The last position stands for the merged token.

    Args:
        scores: S ``[B, N]``.
        candidates: ``[B, N]`` bool; every sample has the same number of tokens that are not candidates.
        count: number of candidates that every sample keeps.

    Returns:
        ``[B, P + count + 1]`` int64 with P the number of protected tokens.
    """
    by_score = scores.float().masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True)
    protected = candidates.to(torch.uint8).argsort(dim=1, stable=True)[:, : int((~candidates[0]).sum())]
    return torch.cat([protected, by_score[:, : count + 1]], dim=1)
