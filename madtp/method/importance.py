"""Importance S of every token: the mean of a self-attention, an alignment and a class-attention term.

Cao et al., CVPR 2024, module DTP, token importance score; ``docs/method.md``, "Importance". Start at
:func:`importance_terms`; :meth:`ImportanceTerms.mean` is S. What attention contributes arrives as
:class:`AttentionStatistics`, so that an attention kernel can collect it without building the attention map;
:func:`attention_statistics` is the plain form for when the map is there.

Symbols: B samples, H heads, N tokens *with* class token and padding, K alignment tokens. A ``[B, H, N, N]`` are the
attention probabilities, o ``[B, H, N, D]`` the attention output before its projection, G ``[B, N, K]`` the guidance.
*Candidates* are the tokens that pruning may take; every sum over tokens j below runs over the candidates of one sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from madtp.config import PruningConfig

TINY = 1e-12


class AttentionStatistics(NamedTuple):
    """What the importance needs to know about one self-attention.

    Attributes:
        received: c ``[B, N]``, the attention that each token receives: c_j = sum_i max_h A_hij over the query tokens i,
            without the class token and padding. None where the keys are not tokens.
        class_row: A_h0j ``[B, H, N]``, the row of the class token, or of the readout token in causal streams. None
            without one.
        output_norms: norms |o_hj| ``[B, H, N]``, the L2 norm of the attention output over the head's width. None without a
            class row.
    """

    received: Tensor | None
    class_row: Tensor | None
    output_norms: Tensor | None


class ImportanceTerms(NamedTuple):
    """The terms of the importance, each ``[B, N]`` float32 and zero outside the candidates.

    Attributes:
        self_attention: s1. None where the attention that tokens receive is not known and another term exists.
        alignment: s2. None without alignment tokens.
        class_attention: s3. None without a class row.
    """

    self_attention: Tensor | None
    alignment: Tensor | None
    class_attention: Tensor | None

    def mean(self) -> Tensor:
        """Return the importance S ``[B, N]``: S = (s1 + s2 + s3) / 3, or the mean of those terms that exist.

        With the default configuration S sums to one over the candidates of a sample. It is zero elsewhere.
        """
        present = [term for term in self if term is not None]
        total = present[0]
        for term in present[1:]:
            total = total + term
        return total / len(present)


def attention_statistics(
    probabilities: Tensor, output: Tensor, queries: Tensor, class_position: Tensor | int | None
) -> AttentionStatistics:
    """Return the statistics of a full attention map.

    The maximum over heads is taken entry by entry, before the sum over queries.

    Args:
        probabilities: A ``[B, H, N, N]``, after the softmax and before dropout.
        output: o ``[B, H, N, D]``, before the output projection.
        queries: ``[B, N]`` bool, the query tokens that count: neither the class token nor padding.
        class_position: position of the class token, one for all samples or ``[B]``. None if there is no class token.
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
    """Return the three terms of the importance::

        s1_j = c_j / sum_j c_j                       c_j = sum_i max_h A_hij
        s2_j = softmax_j((g_j - mean g) / std g)     g_j = max_k G_jk
        s3_j = t_j / sum_j t_j                       t_j = sum_h A_h0j |o_hj| / sum_h |o_hj|

    Each term is non-negative and sums to one over the candidates. That deviates from the authors' code, which uses
    s2_j = g_j / sum_j g_j and s3_j = t_j: ``guidance_score="sum"`` and ``class_score="raw"`` select its forms. The mean and
    the standard deviation of g are those of the candidates of a sample.

    Args:
        statistics: c, A_h0j and norms |o_hj| of the layer's self-attention.
        guidance: G ``[B, N, K]``; None leaves s2 out.
        candidates: ``[B, N]`` bool, the tokens that pruning may take.
        config: the fields ``alignment``, ``guidance_score`` and ``class_score`` are read.
    """
    outside = ~candidates
    count = candidates.sum(dim=1, keepdim=True).clamp_min(1)
    alignment = None
    if guidance is not None and config.alignment:
        best = guidance.float().amax(dim=-1)
        if config.guidance_score == "softmax":
            alignment = _masked_softmax(_standardise(best, outside, count), outside)
        else:
            best = best.masked_fill(outside, 0.0)
            total = best.sum(dim=1, keepdim=True)
            alignment = best / torch.where(total == 0, torch.ones_like(total), total)
    class_attention = None
    if statistics.class_row is not None and statistics.output_norms is not None:
        norms = statistics.output_norms.float()
        seen = (statistics.class_row.float() * norms).sum(dim=1) / norms.sum(dim=1).clamp_min(TINY)
        class_attention = (
            _normalise(seen, outside) if config.class_score == "normalised" else seen.masked_fill(outside, 0)
        )
    if statistics.received is not None:
        self_attention = _normalise(statistics.received.float(), outside)
    elif alignment is None and class_attention is None:
        self_attention = _normalise(torch.zeros_like(candidates, dtype=torch.float32), outside)
    else:
        self_attention = None
    return ImportanceTerms(self_attention, alignment, class_attention)


def guidance_share(guidance: Tensor, candidates: Tensor) -> Tensor:
    """Return the default s2, softmax_j((g_j - mean g) / std g) with g_j = max_k G_jk.

    Standardising comes first because the residual stream, and G with it, grows from layer to layer: without it one token can
    take nearly all of s2 in late layers.

    Args:
        guidance: G ``[B, N, K]``.
        candidates: ``[B, N]`` bool.

    Returns:
        s2 ``[B, N]`` float32, zero outside the candidates.
    """
    count = candidates.sum(dim=1, keepdim=True).clamp_min(1)
    outside = ~candidates
    return _masked_softmax(_standardise(guidance.float().amax(dim=-1), outside, count), outside)


def _masked_softmax(scores: Tensor, outside: Tensor) -> Tensor:
    """Softmax over the tokens that are not ``outside``: zero elsewhere, and zero (not NaN) for a sample that has none."""
    return scores.masked_fill(outside, torch.finfo(scores.dtype).min).softmax(dim=1).masked_fill(outside, 0.0)


def _standardise(values: Tensor, outside: Tensor, count: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the ``count [B, 1]`` candidates of a sample; zeros if values differ by rounding."""
    values = values.masked_fill(outside, 0.0)
    centred = (values - values.sum(dim=1, keepdim=True) / count).masked_fill(outside, 0.0)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / count.sqrt()
    rounding = 1e-5 * torch.linalg.vector_norm(values, float("inf"), dim=1, keepdim=True) + TINY
    scaled: Tensor = centred / deviation.masked_fill(deviation <= rounding, float("inf"))
    return scaled


def _normalise(values: Tensor, outside: Tensor) -> Tensor:
    """Non-negative values divided by their sum; equal shares where all are zero, as in a class row that sees nothing."""
    values = (values + TINY).masked_fill(outside, 0.0)
    return values / values.sum(dim=1, keepdim=True).clamp_min(TINY)
