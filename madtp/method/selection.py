"""Which tokens survive at a site, and in which order.

Cao et al., CVPR 2024, module DTP; ``docs/method.md``, "Who survives". :func:`candidates_of` says which tokens pruning may
take and :func:`select` which of them survive: those above the threshold, as many as were fixed beforehand, or those that a
control of an ablation picks. :func:`survivor_order` says in which order survivors stand.

Symbols: B samples, N tokens *with* class token and padding, S ``[B, N]`` the importance, gamma the gain.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.method.importance import ImportanceTerms
from madtp.method.threshold import keep_best, keep_mask


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


def smallest_drop(config: PruningConfig) -> int:
    """Return the smallest number of tokens that is worth dropping: replacing one token by one merged token saves nothing."""
    return 2 if config.merge else 1


def select(
    terms: ImportanceTerms,
    scores: Tensor,
    theta: Tensor,
    candidates: Tensor,
    config: PruningConfig,
    *,
    gain: float | Tensor,
) -> Tensor:
    """Return the candidates that survive.

    With ``batching="ragged"`` each sample keeps its own {j : S_j > gamma theta}. With ``"uniform"``, as in the authors' code,
    every sample keeps the largest count of the batch, each its own best tokens. With ``"static"`` the counts are given.

    The controls for ablations rank tokens by something else than S: ``selection="random"`` by :func:`random_scores`,
    ``"class_attention"`` by s3. They keep as many tokens as the threshold would, or the share ``config.keep_ratio`` of the
    candidates.

    Args:
        terms: s1, s2 and s3 of the site.
        scores: S ``[B, N]``, the mean of the terms.
        theta: ``[B]`` from :func:`madtp.method.threshold.threshold`.
        candidates: ``[B, N]`` bool.
        config: the fields ``selection``, ``keep_ratio``, ``batching``, ``min_tokens``, ``merge`` and ``seed`` are read.
        gain: gamma, the factor on theta.

    Returns:
        ``[B, N]`` bool, a subset of the candidates; all candidates of a sample that would lose too few
        (:func:`smallest_drop`).

    Raises:
        ConfigError: the batching is "static" and ``counts`` is None, or the selection is "class_attention" at a site without
            class attention.
    """
    least = smallest_drop(config)
    if config.batching == "static":
        raise ConfigError("batching='static' needs counts for each site; freeze the model with madtp.freeze first")
    if config.selection == "threshold" and config.batching == "ragged":
        return keep_mask(scores, theta, gain, candidates, min_tokens=config.min_tokens, smallest_drop=least)
    counts = _counts(scores, theta, candidates, config, gain)
    return keep_best(ranking(terms, scores, config), counts, candidates, smallest_drop=least)


def _counts(scores: Tensor, theta: Tensor, candidates: Tensor, config: PruningConfig, gain: float | Tensor) -> Tensor:
    """How many candidates ``[B]`` each sample keeps where they are chosen by count."""
    if config.keep_ratio is not None:
        total = candidates.sum(dim=1)
        return (config.keep_ratio * total).ceil().long().clamp_min(config.min_tokens)
    counts = keep_mask(scores, theta, gain, candidates, min_tokens=config.min_tokens, smallest_drop=1).sum(dim=1)
    return counts.amax().expand_as(counts) if config.batching == "uniform" else counts


def ranking(terms: ImportanceTerms, scores: Tensor, config: PruningConfig) -> Tensor:
    """Return what tokens are ranked by where they are chosen by count, ``[B, N]``; arguments as for :func:`select`."""
    if config.selection == "random":
        return random_scores(scores, config.seed)
    if config.selection == "class_attention":
        if terms.class_attention is None:
            raise ConfigError(
                "selection='class_attention' needs a class token, and this site has none; "
                "restrict `towers` to the modality that has one, or choose another selection"
            )
        return terms.class_attention
    return scores


def random_scores(scores: Tensor, seed: int) -> Tensor:
    """Return pseudo-random numbers in [0, 1) for the control "random".

    They are a hash of S, so the draw for a sample does not depend on the other samples of the batch.

    Args:
        scores: S ``[B, N]``.
        seed: another seed gives another draw.

    Returns:
        ``[B, N]`` float32.
    """
    bits = scores.detach().float().contiguous().view(torch.int32).long()
    position = torch.arange(scores.shape[1], device=scores.device)
    word = (bits + 0x9E3779B1 * (position + 1) + 0x85EBCA77 * (seed + 1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x46A7B8A5)):
        word = ((word ^ (word >> shift)) * factor) & 0xFFFFFFFF
    return ((word ^ (word >> 16)) & 0xFFFFFF).float() / 0x1000000


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
