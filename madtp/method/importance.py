"""Importance S of every token: the mean of a self-attention, an alignment and a class-attention term.

Cao et al., CVPR 2024, module DTP, token importance score; ``docs/method.md``, "Importance". Start at
:func:`importance_terms`; :meth:`ImportanceTerms.mean` is S. What attention contributes arrives as
:class:`AttentionStatistics`, so that an attention kernel can collect it without building the attention map;
:func:`attention_statistics` is the plain form for when the map is there.

The terms are computed from tensors, or from arrays where no gradient is wanted: on short vectors numpy takes a third of the
time. Both take the same steps.

Symbols: B samples, H heads, N tokens *with* class token and padding, K alignment tokens. A ``[B, H, N, N]`` are the
attention probabilities, o ``[B, H, N, D]`` the attention output before its projection, G ``[B, N, K]`` the guidance.
*Candidates* are the tokens that pruning may take; every sum over tokens j below runs over the candidates of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.arrays import Values, in_float32, namespace, precise, within

TINY = 1e-12


@dataclass(frozen=True)
class AttentionStatistics(Generic[Values]):
    """What the importance needs to know about one self-attention, as tensors or as arrays.

    Attributes:
        received: c ``[B, N]``, the attention that each token receives: c_j = sum_i max_h A_hij over the query tokens i,
            without the class token and padding. None where the keys are not tokens, or where nothing asks for it.
        class_attention: t ``[B, N]``, what the class token, or the readout token in causal streams, attends to:
            t_j = sum_h A_h0j |o_hj| / sum_h |o_hj|. None without one, or where nothing asks for it.
    """

    received: Values | None
    class_attention: Values | None


@dataclass(frozen=True)
class ImportanceTerms(Generic[Values]):
    """The terms of the importance, each ``[B, N]`` float32 and zero outside the candidates.

    Attributes:
        self_attention: s1. None where the attention that tokens receive is not known and another term exists.
        alignment: s2. None without alignment tokens.
        class_attention: s3. None without a class row.
    """

    self_attention: Values | None
    alignment: Values | None
    class_attention: Values | None

    def present(self) -> list[Values]:
        """The terms that exist."""
        return [one for one in (self.self_attention, self.alignment, self.class_attention) if one is not None]

    def mean(self) -> Values:
        """Return the importance S ``[B, N]``: S = (s1 + s2 + s3) / 3, or the mean of those terms that exist.

        With the default configuration S sums to one over the candidates of a sample. It is zero elsewhere.
        """
        present = self.present()
        total = present[0]
        for term in present[1:]:
            total = total + term
        return total / len(present)


def attention_statistics(
    probabilities: Tensor, output: Tensor, queries: Tensor, class_position: Tensor | int | None
) -> AttentionStatistics[Tensor]:
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
        return AttentionStatistics(received, None)
    if isinstance(class_position, int):
        class_row = probabilities[:, :, class_position]
    else:
        batch = torch.arange(probabilities.shape[0], device=probabilities.device)
        class_row = probabilities[batch, :, class_position]
    return AttentionStatistics(received, class_attention(class_row, output, head_dim=1))


def class_attention(class_row: Tensor, output: Tensor, head_dim: int) -> Tensor:
    """Return t, the attention of the class token weighted by how large each head's output is at the token attended to.

    Args:
        class_row: A_h0j, heads at ``head_dim``.
        output: o_hj, with the width of a head as a further, last dimension.
        head_dim: dimension of heads.

    Returns:
        t_j, without ``head_dim``, in float32 at least.
    """
    norms = torch.linalg.vector_norm(output, dim=-1, dtype=precise(output.dtype))
    seen: Tensor = (class_row * norms).sum(dim=head_dim) / norms.sum(dim=head_dim).clamp_min(TINY)
    return seen


def importance_terms(
    statistics: AttentionStatistics[Values],
    best_guidance: Values | None,
    candidates: Values | None,
    config: PruningConfig,
) -> ImportanceTerms[Values]:
    """Return the three terms of the importance::

        s1_j = c_j / sum_j c_j                       c_j = sum_i max_h A_hij
        s2_j = softmax_j((g_j - mean g) / std g)     g_j = max_k G_jk
        s3_j = t_j / sum_j t_j                       t_j = sum_h A_h0j |o_hj| / sum_h |o_hj|

    Each term is non-negative and sums to one over the candidates. That deviates from the authors' code, which uses
    s2_j = g_j / sum_j g_j and s3_j = t_j: ``guidance_score="sum"`` and ``class_score="raw"`` select its forms. The mean and
    the standard deviation of g are those of the candidates of a sample.

    Args:
        statistics: c and t of the layer's self-attention, tensors or arrays, and so are the next two.
        best_guidance: g ``[B, N]`` from :func:`best_of`; None leaves s2 out.
        candidates: ``[B, N]`` bool, the tokens that pruning may take; None if it may take all of them.
        config: the fields ``alignment``, ``guidance_score`` and ``class_score`` are read.
    """
    alignment = None
    if best_guidance is not None and config.alignment:
        if config.guidance_score == "softmax":
            alignment = guidance_share(best_guidance, candidates)
        else:
            best = within(best_guidance, candidates)
            total = best.sum(1)[:, None]
            alignment = best / (total + (total == 0))
    class_attention = None
    if statistics.class_attention is not None:
        seen = in_float32(statistics.class_attention)
        class_attention = _shares(seen, candidates) if config.class_score == "normalised" else within(seen, candidates)
    if statistics.received is not None:
        self_attention = _shares(in_float32(statistics.received), candidates)
    elif alignment is None and class_attention is None and candidates is not None:
        self_attention = _shares(in_float32(candidates * 0.0), candidates)
    else:
        self_attention = None
    return ImportanceTerms(self_attention, alignment, class_attention)


def best_of(guidance: Tensor) -> Tensor:
    """Return g ``[B, N]`` float32, g_j = max_k G_jk: how much its favourite alignment token likes each token."""
    return guidance.float().amax(dim=-1)


def guidance_share(best_guidance: Values, candidates: Values | None) -> Values:
    """Return the default s2, softmax_j((g_j - mean g) / std g) with g_j = max_k G_jk.

    Standardising comes first because the residual stream, and G with it, grows from layer to layer: without it one token can
    take nearly all of s2 in late layers.

    Args:
        best_guidance: g ``[B, N]`` from :func:`best_of`.
        candidates: ``[B, N]`` bool; None for all.

    Returns:
        s2 ``[B, N]`` float32, zero outside the candidates.
    """
    best = within(best_guidance, candidates)
    count = max(1, best.shape[1]) if candidates is None else _at_least_one(in_float32(candidates.sum(1)[:, None]))
    centred = within(best - best.sum(1)[:, None] / count, candidates)
    # The square root of zero has no gradient.
    deviation = ((centred * centred).sum(1)[:, None] / count + TINY**2) ** 0.5
    # Where values differ by rounding only, all are zero.
    rounding = 1e-5 * _largest(abs(best))
    scaled = within(centred / deviation, deviation > rounding)
    shares = within(namespace(scaled).exp(scaled - _largest(scaled)), candidates)
    total = shares.sum(1)[:, None]
    normalised: Values = shares / (total + (total == 0))
    return normalised


def _at_least_one(count: Values) -> Values:
    positive: Values = count + (count == 0)
    return positive


def _largest(values: Values) -> Values:
    """``[B, 1]``, the largest of non-negative or standardised values of each sample; values need not exist."""
    if values.shape[1] == 0:
        largest: Values = values.sum(1)[:, None]
    else:
        largest = namespace(values).amax(values, 1)[:, None]
    return largest


def _shares(values: Values, candidates: Values | None) -> Values:
    """Non-negative values divided by their sum; equal shares where all are zero, as in a class row that sees nothing."""
    values = within(values + TINY, candidates)
    total = values.sum(1)[:, None]
    shares: Values = values / total if candidates is None else values / (total + (total == 0))
    return shares
