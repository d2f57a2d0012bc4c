"""DTP's threshold and the tokens that pass it (the paper, section on DTP; docs/method.md, "Threshold").

`threshold` turns guidance and importance into one number a sample; `keep_mask` compares. `uniform_keep` and `keep_best`
choose by count instead. A site calls madtp/method/selection.py, which picks among these by configuration. Shapes: B samples,
N tokens *with* class token and padding, K alignment tokens; only *candidates* (tokens that pruning may take) are ever
judged. All arithmetic is in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp.method.importance import TINY

SOFTNESS = 0.1
LOWEST = torch.finfo(torch.float32).min


def threshold(guidance: Tensor | None, scores: Tensor, candidates: Tensor, temperature: float | Tensor) -> Tensor:
    """theta = min_k sum_j softmax_j(G_jk / T) S_j.

    It lies between the smallest and the largest S of the candidates. T -> infinity gives the mean of S; T -> 0 gives the
    smallest S among the tokens that some alignment token likes best.

    Args:
        guidance: G [B, N, K]; None (no alignment guidance) gives the mean of S.
        scores: S [B, N].
        candidates: [B, N] bool.
        temperature: T, above 0; a tensor may carry a gradient.

    Returns:
        theta [B] float32; 0 for a sample without candidates.
    """
    scores = scores.float().masked_fill(~candidates, 0.0)
    if guidance is None:
        return scores.sum(dim=1) / candidates.sum(dim=1).clamp_min(1)
    votes = (guidance.float() / temperature).masked_fill(~candidates.unsqueeze(-1), LOWEST).softmax(dim=1)
    # A batched product: the same sum as an einsum, which is slower on CPUs.
    return torch.bmm(scores.unsqueeze(1), votes).squeeze(1).amin(dim=1)


def keep_mask(
    scores: Tensor,
    theta: Tensor,
    gain: float | Tensor,
    candidates: Tensor,
    *,
    min_tokens: int = 1,
    smallest_drop: int = 2,
) -> Tensor:
    """Each sample's own survivors, {j : S_j > gain * theta}, whoever its batch mates are.

    Args:
        scores: S [B, N].
        theta: [B].
        gain: factor on theta.
        candidates: [B, N] bool.
        min_tokens: so many of the best candidates survive in any case; among equals the earlier one.
        smallest_drop: a sample that would lose fewer tokens loses none. 2 where the dropped are merged into a new token,
            as trading one token for one saves nothing; 1 otherwise.

    Returns:
        [B, N] bool, a subset of the candidates.
    """
    scores = scores.float()
    kept = scores > gain * theta.unsqueeze(1)
    floor = min(min_tokens, scores.shape[1])
    if floor:
        # A stable sort: among equals `topk` picks by the width of the batch, which batch mates decide.
        ranked = scores.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
        best = ranked[:, :floor]
        kept = kept.scatter(1, best, True)
    return _unless_too_few(kept & candidates, candidates, smallest_drop)


def uniform_keep(scores: Tensor, kept: Tensor, candidates: Tensor, *, smallest_drop: int = 2) -> Tensor:
    """Every sample keeps as many tokens as the sample of the batch that keeps most, each its own best.

    Args:
        scores: S [B, N].
        kept: [B, N] bool, each sample's own survivors, from `keep_mask` with smallest_drop=1.
        candidates: [B, N] bool.
        smallest_drop: as in `keep_mask`, here per sample after the counts are made equal.

    Returns:
        [B, N] bool. A sample with fewer candidates than the common count keeps them all.
    """
    count = kept.sum(dim=1).amax().expand(scores.shape[0])
    return keep_best(scores, count, candidates, smallest_drop=smallest_drop)


def keep_best(scores: Tensor, counts: Tensor, candidates: Tensor, *, smallest_drop: int = 2) -> Tensor:
    """The counts[b] best candidates of each sample; among equals the earlier one.

    Args:
        scores: what to rank by, [B, N].
        counts: [B] long.
        candidates: [B, N] bool.
        smallest_drop: as in `keep_mask`.

    Returns:
        [B, N] bool.
    """
    order = scores.float().masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < counts.unsqueeze(1)
    kept = torch.zeros_like(candidates).scatter(1, order, first) & candidates
    return _unless_too_few(kept, candidates, smallest_drop)


def straight_through_gate(scores: Tensor, theta: Tensor, gain: float | Tensor, kept: Tensor) -> Tensor:
    """A factor of exactly one on every survivor that carries the gradient of a soft mask.

    The soft mask is sigmoid((S / (gain theta) - 1) / SOFTNESS): gradients reach S, theta and through them the alignment
    tokens, which the hard comparison stops. Multiply the survivors by it in training.

    Args:
        scores: S [B, N].
        theta: [B].
        gain: factor on theta.
        kept: [B, N] bool.

    Returns:
        [B, N] float32, one on survivors and zero elsewhere.
    """
    limit = (gain * theta.float()).clamp_min(TINY).unsqueeze(1)
    soft = torch.sigmoid((scores.float() / limit - 1.0) / SOFTNESS)
    return (1.0 + (soft - soft.detach())) * kept


def _unless_too_few(kept: Tensor, candidates: Tensor, smallest_drop: int) -> Tensor:
    dropped = (candidates & ~kept).sum(dim=1, keepdim=True)
    return torch.where(dropped < smallest_drop, candidates, kept)
