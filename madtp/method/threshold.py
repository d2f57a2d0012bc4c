"""The threshold theta, and the tokens that pass it.

Cao et al., CVPR 2024, module DTP; ``docs/method.md``, "Threshold". :func:`threshold` turns guidance and importance into one
number per sample and :func:`keep_mask` compares. :func:`keep_best` keeps a given number of tokens instead. Sites call
``madtp/method/selection.py``, which chooses between the two by configuration.

Symbols: B samples, N tokens *with* class token and padding, K alignment tokens, S ``[B, N]`` the importance, G ``[B, N, K]``
the guidance, T the temperature, gamma the gain. *Candidates* are the tokens that pruning may take; no other token is judged.
All arithmetic is in float32. Thresholds are tensors, because gradients may pass through them; who survives is decided on the
host, which has to know how many.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from madtp.method.arrays import Flags, Numbers
from madtp.method.importance import TINY

SOFTNESS = 0.1
LOWEST = torch.finfo(torch.float32).min


def threshold(
    guidance: Tensor | None, scores: Tensor, candidates: Tensor | None, temperature: float | Tensor
) -> Tensor:
    """Return theta = min_k sum_j softmax_j(G_jk / T) S_j.

    Every alignment token k votes for a mean of S, weighted by how much it likes each token; the lowest vote counts. Theta
    lies between the smallest and the largest S of the candidates. T -> infinity gives the mean of S, the strongest pruning;
    T -> 0 gives the smallest S among the tokens that some alignment token likes best.

    The paper writes sparsemax and calls the threshold learnable. The authors' code has a softmax and no gradient through the
    comparison, and so has this function; :func:`straight_through_gate` is the option with a gradient.

    Args:
        guidance: G ``[B, N, K]``. None, without alignment tokens, gives the mean of S.
        scores: S ``[B, N]``.
        candidates: ``[B, N]`` bool; None for all.
        temperature: T, above 0; a tensor may carry a gradient.

    Returns:
        theta ``[B]`` float32; 0 for a sample without candidates.
    """
    scores = scores.float()
    if candidates is not None:
        scores = scores.masked_fill(~candidates, 0.0)
    if guidance is None:
        count = max(1, scores.size(1)) if candidates is None else candidates.sum(dim=1).clamp_min(1)
        return scores.sum(dim=1) / count
    liking = guidance.float()
    if isinstance(temperature, Tensor) or temperature != 1.0:
        liking = liking / temperature
    if candidates is not None:
        liking = liking.masked_fill(~candidates.unsqueeze(-1), LOWEST)
    # The batched product gives the same sum as an einsum and is faster on CPUs.
    return torch.bmm(scores.unsqueeze(1), liking.softmax(dim=1)).squeeze(1).amin(dim=1)


def keep_mask(
    scores: Numbers,
    theta: Numbers,
    gain: float,
    candidates: Flags | None,
    *,
    min_tokens: int = 1,
    smallest_drop: int = 2,
) -> Flags:
    """Return the survivors of each sample, {j : S_j > gamma theta}, whatever the other samples of the batch are.

    The paper's gain gamma is 1. The comparison is strict: at a low temperature theta can equal the importance of a token,
    which is then dropped.

    Args:
        scores: S ``[B, N]`` float32.
        theta: ``[B]`` float32.
        gain: gamma.
        candidates: ``[B, N]``; None for all.
        min_tokens: number of candidates of the highest importance that survive in any case. Of equal tokens the first counts.
        smallest_drop: a sample that would lose fewer tokens than this loses none. It is 2 where dropped tokens are merged,
            as replacing one token by one merged token saves nothing, and 1 elsewhere.

    Returns:
        ``[B, N]``, a subset of the candidates.
    """
    with np.errstate(over="ignore"):  # a gain beyond all numbers keeps nothing
        kept: Flags = scores > gain * theta[:, None]
    if candidates is not None:
        kept &= candidates
    # Where as many as the minimum are above the threshold, they include the best.
    for sample in (kept.sum(1) < min_tokens).nonzero()[0]:
        ranked = scores[sample] if candidates is None else np.where(candidates[sample], scores[sample], -np.inf)
        kept[sample, _best_first(ranked)[:min_tokens]] = True
    return _all_if_too_few_dropped(kept, candidates, smallest_drop)


def keep_best(scores: Numbers, counts: Numbers, candidates: Flags | None, *, smallest_drop: int = 2) -> Flags:
    """Return the ``counts[b]`` best candidates of each sample; of equal tokens the first counts as the better one.

    Args:
        scores: what tokens are ranked by ``[B, N]``.
        counts: ``[B]``. A sample with fewer candidates keeps them all.
        candidates: ``[B, N]``; None for all.
        smallest_drop: as in :func:`keep_mask`.

    Returns:
        ``[B, N]``, a subset of the candidates.
    """
    order = _best_first(scores if candidates is None else np.where(candidates, scores, -np.inf))
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, order, np.arange(scores.shape[1]) < counts[:, None], 1)
    return _all_if_too_few_dropped(kept, candidates, smallest_drop)


def straight_through_gate(scores: Tensor, theta: Tensor, gain: float | Tensor, kept: Tensor) -> Tensor:
    """Return a factor for the survivors that is exactly one and has the gradient of a soft mask.

    The soft mask is sigmoid((S / (gamma theta) - 1) / 0.1). In training, the survivors are multiplied by the factor, so that
    gradients reach S, theta and, through them, the alignment tokens; the comparison in :func:`keep_mask` stops gradients.
    This is an option that neither the paper nor the authors' code has.

    Args:
        scores: S ``[B, N]``.
        theta: ``[B]``.
        gain: gamma.
        kept: ``[B, N]`` bool.

    Returns:
        ``[B, N]`` float32, one on survivors and zero elsewhere.
    """
    limit = (gain * theta.float()).clamp_min(TINY).unsqueeze(1)
    soft = torch.sigmoid((scores.float() / limit - 1.0) / SOFTNESS)
    return (1.0 + (soft - soft.detach())) * kept


def _best_first(scores: Numbers) -> Numbers:
    """The order of falling scores; equal ones keep theirs, so that it does not depend on the rest of the batch."""
    order: Numbers = np.argsort(-scores, axis=-1, kind="stable")
    return order


def _all_if_too_few_dropped(kept: Flags, candidates: Flags | None, smallest_drop: int) -> Flags:
    total: int | Numbers = kept.shape[1]
    if candidates is not None:
        kept, total = kept & candidates, candidates.sum(1)
    few = total - kept.sum(1) < smallest_drop
    if few.any():
        kept[few] = True if candidates is None else candidates[few]
    return kept
