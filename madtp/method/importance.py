"""Importance S of every token: the mean of three terms (the paper, section on DTP; docs/method.md, "Importance").

`importance_terms` gives the terms, `importance` their mean. What attention contributes comes in as
:class:`AttentionStatistics`, so that an attention kernel may gather them without building the map;
`attention_statistics` is the plain form for when the map is there. Shapes: B samples, H heads, N tokens *with* class
token and padding, K alignment tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from madtp.config import PruningConfig

TINY = 1e-12


class AttentionStatistics(NamedTuple):
    """What pruning needs to know about one self-attention.

    received: [B, N], c_j: sum over query tokens i (class row and padding rows excluded) of max over heads A_hij; None
        where the keys are no tokens.
    class_row: [B, H, N], A_h0j, the row of the class token (of the readout token in causal streams); None without one.
    output_norms: [B, H, N], |o_hj|: L2 norm over the head's width of the attention output before the projection;
        None where there is no class row.
    """

    received: Tensor | None
    class_row: Tensor | None
    output_norms: Tensor | None


class ImportanceTerms(NamedTuple):
    """s1, s2, s3, each [B, N] in float32 and zero outside the candidates; None where the term does not exist."""

    self_attention: Tensor | None
    alignment: Tensor | None
    class_attention: Tensor | None

    def mean(self) -> Tensor:
        """S [B, N]: the mean of the terms that exist."""
        present = [term for term in self if term is not None]
        total = present[0]
        for term in present[1:]:
            total = total + term
        return total / len(present)


def attention_statistics(
    probabilities: Tensor, output: Tensor, queries: Tensor, class_position: Tensor | int | None
) -> AttentionStatistics:
    """Statistics from a full attention map.

    Args:
        probabilities: A [B, H, N, N], after softmax, before dropout.
        output: o [B, H, N, head_dim], before the output projection.
        queries: [B, N] bool, the rows that count: neither the class token's nor padding's.
        class_position: position of the class token, one for all or [B]; None where there is none.
    """
    strongest = probabilities.amax(dim=1)
    received = strongest.masked_fill(~queries.unsqueeze(-1), 0.0).sum(dim=1)
    if class_position is None:
        return AttentionStatistics(received, None, None)
    if isinstance(class_position, int):
        class_row = probabilities[:, :, class_position]
    else:
        batch = torch.arange(probabilities.shape[0], device=probabilities.device)
        class_row = probabilities[batch, :, class_position]
    return AttentionStatistics(received, class_row, output.norm(dim=-1))


def importance_terms(
    statistics: AttentionStatistics,
    guidance: Tensor | None,
    candidates: Tensor,
    config: PruningConfig,
) -> ImportanceTerms:
    """The three terms, every one zero outside the candidates.

    s1_j = c_j / sum c   (left out where c is not known, if there is another term)
    s2_j = softmax_j((g_j - mean g) / std g), g_j = max_k G_jk   (guidance_score="sum": g_j / sum g)
    s3_j = t_j / sum t, t_j = sum_h A_h0j |o_hj| / sum_h |o_hj|   (class_score="raw": t_j)

    Args:
        statistics: of the layer's self-attention.
        guidance: G [B, N, K]; None leaves s2 out.
        candidates: [B, N] bool, the tokens that pruning may take.
        config: its `guidance_score`, `class_score` and `alignment` are read.
    """
    alignment = None
    if guidance is not None and config.alignment:
        if config.guidance_score == "softmax":
            alignment = guidance_share(guidance, candidates)
        else:
            best = guidance.float().amax(dim=-1)
            best = best.masked_fill(~candidates, 0.0)
            total = best.sum(dim=1, keepdim=True)
            alignment = best / torch.where(total == 0, torch.ones_like(total), total)
    class_attention = None
    if statistics.class_row is not None and statistics.output_norms is not None:
        norms = statistics.output_norms.float()
        diversity = norms / norms.sum(dim=1, keepdim=True).clamp_min(TINY)
        class_attention = (statistics.class_row.float() * diversity).sum(dim=1).masked_fill(~candidates, 0.0)
        if config.class_score == "normalised":
            class_attention = _normalise(class_attention, candidates)
    received = statistics.received
    if received is None and (alignment is not None or class_attention is not None):
        return ImportanceTerms(None, alignment, class_attention)
    known = torch.zeros_like(candidates, dtype=torch.float32) if received is None else received.float()
    return ImportanceTerms(_normalise(known, candidates), alignment, class_attention)


def importance(
    statistics: AttentionStatistics,
    guidance: Tensor | None,
    candidates: Tensor,
    config: PruningConfig,
) -> Tensor:
    """S [B, N] float32, the mean of the terms that exist; see `importance_terms`.

    With our defaults S sums to one over the candidates and is zero elsewhere.
    """
    return importance_terms(statistics, guidance, candidates, config).mean()


def guidance_share(guidance: Tensor, candidates: Tensor) -> Tensor:
    """Our s2 [B, N] of guidance G [B, N, K]: the softmax over the candidates [B, N] of g, standardised per sample."""
    return masked_softmax(_standardise(guidance.float().amax(dim=-1), candidates), candidates)


def masked_softmax(scores: Tensor, mask: Tensor, dim: int = 1) -> Tensor:
    """Softmax along `dim` over the entries in `mask`, zero elsewhere, and zero (not NaN) where the mask is empty."""
    filled = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return filled.softmax(dim=dim) * mask


def _standardise(values: Tensor, candidates: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the candidates of each sample; values that differ by rounding alone become zeros."""
    count = candidates.sum(dim=1, keepdim=True).clamp_min(1)
    values = values.masked_fill(~candidates, 0.0)
    centred = (values - values.sum(dim=1, keepdim=True) / count).masked_fill(~candidates, 0.0)
    variance = centred.square().sum(dim=1, keepdim=True) / count
    alike = variance <= (1e-5 * values.abs().amax(dim=1, keepdim=True) + TINY).square()
    # The root of zero has no gradient, not even where its result is left out.
    return (centred / variance.masked_fill(alike, 1.0).sqrt()).masked_fill(alike, 0.0)


def _normalise(values: Tensor, candidates: Tensor) -> Tensor:
    """Non-negative values over their sum; equal shares where all are zero (a class row that sees nothing)."""
    values = values.masked_fill(~candidates, 0.0)
    total = values.sum(dim=1, keepdim=True)
    shares = candidates / candidates.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.where(total > TINY, values / total.clamp_min(TINY), shares)
