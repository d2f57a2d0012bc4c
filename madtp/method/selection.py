"""Which tokens survive at a site: the one decision, by configuration.

`candidates_of` says which tokens may go, `select` which of them stay: the method (`keep_mask`, per sample or uniform),
counts fixed beforehand, or one of the controls that an ablation compares with. `survivor_order` says in which order
survivors stand. Shapes: B samples, N tokens *with* class token and padding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.method.importance import ImportanceTerms
from madtp.method.threshold import keep_best, keep_mask, uniform_keep


def candidates_of(valid: Tensor, protected: Tensor, config: PruningConfig) -> Tensor:
    """The tokens that pruning may take, [B, N] bool: neither protected nor, with padding="excluded", padding.

    With our default padding survives only where it is protected (a readout at the last position may read it): a site keeps
    `select(...) | protected`.
    """
    return ~protected if config.padding == "scored" else valid & ~protected


def smallest_drop(config: PruningConfig) -> int:
    """The least number of tokens worth dropping: trading one token for one merged token saves nothing."""
    return 2 if config.merge else 1


def select(
    terms: ImportanceTerms,
    scores: Tensor,
    theta: Tensor,
    candidates: Tensor,
    config: PruningConfig,
    *,
    gain: float | Tensor,
    keep_ratio: float | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The candidates that survive.

    Args:
        terms: s1, s2, s3 of the site; the control "class_attention" ranks by s3.
        scores: S [B, N], the mean of the terms.
        theta: [B], from `madtp.method.threshold.threshold`.
        candidates: [B, N] bool.
        config: its `selection`, `batching`, `min_tokens` and `merge` are read.
        gain: factor on theta.
        keep_ratio: for the controls, the fraction of the candidates to keep; None takes `config.keep_ratio`.
        counts: [B] long, candidates to keep with batching="static"; it overrides theta.

    Returns:
        [B, N] bool, a subset of the candidates; all of them in a sample that would lose too few.

    Raises:
        ConfigError: "static" without counts, or "class_attention" at a site without class attention.
    """
    least = smallest_drop(config)
    ratio = config.keep_ratio if keep_ratio is None else keep_ratio
    if config.batching == "static" and counts is None:
        raise ConfigError("batching='static' needs counts for each site; freeze the model with madtp.freeze first")
    if counts is not None:
        own = None
    elif ratio is not None and config.selection != "threshold":
        total = candidates.sum(dim=1)
        counts = (ratio * total).ceil().long().clamp_min(config.min_tokens)
        own = None
    else:
        own_least = least if config.batching == "ragged" and config.selection == "threshold" else 1
        own = keep_mask(scores, theta, gain, candidates, min_tokens=config.min_tokens, smallest_drop=own_least)
        if config.selection == "threshold":
            return own if config.batching == "ragged" else uniform_keep(scores, own, candidates, smallest_drop=least)
    if counts is None:
        assert own is not None
        counts = own.sum(dim=1)
        if config.batching == "uniform":
            counts = counts.amax().expand_as(counts)
    return keep_best(_ranking(terms, scores, config), counts, candidates, smallest_drop=least)


def survivor_order(
    survivors: Tensor, scores: Tensor, candidates: Tensor, rule: Literal["position", "topk"] = "position"
) -> Tensor:
    """The order in which survivors stand in the pruned stream (a merged token comes after them).

    Args:
        survivors: [B, N] bool, protected ones included.
        scores: S [B, N].
        candidates: [B, N] bool.
        rule: "position" keeps the original order. "topk" puts protected tokens first and the others as
            torch.topk(sorted=False) happens to return them, which is what the authors' code does.

    Returns:
        [B, N] long: a permutation of the positions, survivors first.
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
    """Where the authors' code reads the attention mask after pruning (mask_order="sorted"): at the protected tokens, then
    at the `count` best and the next one (it stands for the merged token) by falling score, whatever order the tokens are in.

    Args:
        scores: S [B, N].
        candidates: [B, N] bool, as many not candidates in every sample.
        count: candidates that every sample keeps.

    Returns:
        [B, number of protected tokens + count + 1] long.
    """
    by_score = scores.float().masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True)
    protected = candidates.to(torch.uint8).argsort(dim=1, stable=True)[:, : int((~candidates[0]).sum())]
    return torch.cat([protected, by_score[:, : count + 1]], dim=1)


def random_scores(scores: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) for the control "random": a hash of S, so that the draw of a sample ignores its batch mates.

    Args:
        scores: S [B, N].
        seed: another seed, another draw.

    Returns:
        [B, N] float32.
    """
    bits = scores.detach().float().contiguous().view(torch.int32).long()
    position = torch.arange(scores.shape[1], device=scores.device)
    word = (bits + 0x9E3779B1 * (position + 1) + 0x85EBCA77 * (seed + 1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x46A7B8A5)):
        word = ((word ^ (word >> shift)) * factor) & 0xFFFFFFFF
    return ((word ^ (word >> 16)) & 0xFFFFFF).float() / 0x1000000


def _ranking(terms: ImportanceTerms, scores: Tensor, config: PruningConfig) -> Tensor:
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
