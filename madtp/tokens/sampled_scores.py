"""Statistics of DTP from some of the queries, so that the attention itself can run by a kernel that makes no map.

Start at :func:`attention_with_sampled_statistics`. The attention that a key receives, c_j = sum_i max_h A_hij, becomes a sum
over n evenly spaced queries i; the importance divides c by its sum, so only the shares count. The class row and the norms of
the output stay exact (``docs/method.md``, "Importance").

Axis legend: B samples, H heads, Q queries, K keys, D head width, n sampled queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from madtp.method.arrays import precise
from madtp.method.importance import AttentionStatistics, class_attention
from madtp.tokens.attention import AttentionInputs, hides_nothing, joined, plain_attention, valid_keys
from madtp.tokens.scored_attention import Asked, Counted, Slot, attention_with_statistics, is_plain
from madtp.tokens.state import marked_first


def attention_with_sampled_statistics(
    inputs: AttentionInputs, asked: Asked
) -> tuple[Tensor, AttentionStatistics[Tensor]]:
    """Return the output of an attention together with the statistics of DTP from ``asked.queries`` of its queries.

    Queries are spaced over the tokens of each sample that are not padding, so that a sample does not depend on its batch. All
    count where a sample has no more of them, and where the attention has dropout, a softcap, or a mask that differs between
    queries or heads.

    Args:
        inputs: those of a self-attention, as in :func:`~madtp.tokens.scored_attention.attention_with_statistics`.
        asked: what is asked.

    Returns:
        output ``[B, H, Q, Dv]`` and its statistics.
    """
    queries = asked.queries if asked.received else 0
    mask = None if inputs.mask is None else inputs.mask[(None,) * (4 - inputs.mask.dim())]
    unmasked = replace(inputs, mask=None).ungrouped()
    of_keys = mask is None or (mask.size(1) == 1 and mask.size(2) == 1)
    if queries is None or inputs.query.size(2) <= queries or not of_keys or not is_plain(unmasked):
        return attention_with_statistics(inputs, asked)
    if mask is not None and hides_nothing(mask):
        mask = None
    output = plain_attention(replace(inputs, mask=mask))
    sampled, weights = [], None
    if queries:
        sample = (
            _all_alike(unmasked.query, asked.counted, queries)
            if mask is None
            else _by_sample(unmasked, mask, asked.counted, queries)
        )
        sampled, weights = [sample.query], sample.weights
    if asked.class_slot is not None:
        sampled.append(_query_at(unmasked.query, asked.class_slot))
    if not sampled:
        return output, AttentionStatistics(None, None)
    scale = unmasked.query.size(-1) ** -0.5 if unmasked.scale is None else unmasked.scale
    probabilities = _softmax((joined(sampled, 2) * scale) @ unmasked.key.transpose(2, 3), mask)
    received = None
    if queries:
        strongest = probabilities[:, :, :queries].amax(1)
        received = strongest.sum(1) if weights is None else torch.bmm(weights.to(strongest.dtype), strongest).squeeze(1)
    if asked.class_slot is None:
        return output, AttentionStatistics(received, None)
    return output, AttentionStatistics(received, class_attention(probabilities[:, :, -1], output, head_dim=1))


def observe_sample(inputs: AttentionInputs, asked: Asked) -> SampleObserved:
    """Return the output and statistics of one sample ``[1, H, N, D]``, whatever stands between scores and probabilities."""
    if isinstance(asked.counted, Tensor):
        asked = replace(asked, counted=asked.counted[None])
    output, statistics = attention_with_sampled_statistics(inputs, asked)
    received, seen = statistics.received, statistics.class_attention
    return SampleObserved(
        output[0].transpose(0, 1), None if received is None else received[0], None if seen is None else seen[0]
    )


class SampleObserved(NamedTuple):
    """Of one sample the output ``[N, H, Dv]``, the attention received ``[N]`` and the class attention ``[N]``."""

    output: Tensor
    received: Tensor | None
    class_attention: Tensor | None


@dataclass(frozen=True)
class _Sample:
    """Some queries ``[B, H, n, D]``, and whether each counts ``[B, 1, n]``; None if all do."""

    query: Tensor
    weights: Tensor | None


def _all_alike(query: Tensor, counted: Counted, queries: int) -> _Sample:
    """The same positions of all samples, which have no padding."""
    length = query.size(2)
    chosen = _evenly_spaced(queries, length, query.device)
    if isinstance(counted, Tensor):
        return _Sample(query.index_select(2, chosen), counted.index_select(1, chosen).unsqueeze(1))
    first = length // (2 * queries)  # the smallest position that is asked
    weights = None if first >= counted else (chosen >= counted).expand(query.size(0), 1, queries)
    return _Sample(query.index_select(2, chosen), weights)


def _by_sample(inputs: AttentionInputs, mask: Tensor, counted: Counted, queries: int) -> _Sample:
    """Positions of each sample, spaced over the keys that its mask shows."""
    batch, heads, length, width = inputs.query.shape
    visible = valid_keys(mask, batch, length)
    assert visible is not None
    rank = _evenly_spaced(queries, visible.sum(1, keepdim=True), mask.device)
    slots = marked_first(visible).gather(1, rank)
    # A sample with fewer tokens than queries is asked for some of them twice.
    fresh = torch.cat([torch.ones_like(rank[:, :1], dtype=torch.bool), rank[:, 1:] != rank[:, :-1]], 1)
    taken = inputs.query.gather(2, slots[:, None, :, None].expand(batch, heads, queries, width))
    counts = counted.gather(1, slots) if isinstance(counted, Tensor) else slots >= counted
    return _Sample(taken, (counts & fresh).unsqueeze(1))


def _evenly_spaced(count: int, length: int | Tensor, device: torch.device) -> Tensor:
    """``count`` positions below ``length``, the middles of equal parts; ``[B, count]`` for lengths ``[B, 1]``."""
    return (2 * torch.arange(count, device=device) + 1) * length // (2 * count)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Probabilities in float32 at least; zeros for a query that sees no key."""
    dtype = precise(scores.dtype)
    if mask is None:
        return scores.softmax(-1, dtype=dtype)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=dtype).nan_to_num(0.0)


def _query_at(query: Tensor, slot: Slot) -> Tensor:
    """The query ``[B, H, 1, D]`` at a slot of each sample."""
    if isinstance(slot, int):
        return query[:, :, slot : slot + 1]
    return query[torch.arange(query.size(0), device=query.device), :, slot].unsqueeze(2)
