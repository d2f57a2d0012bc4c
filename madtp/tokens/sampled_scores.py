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
from madtp.method.importance import AttentionStatistics
from madtp.tokens.attention import (
    AttentionInputs,
    hides_nothing,
    join_masks,
    joined,
    plain_attention,
    valid_keys,
)
from madtp.tokens.scored_attention import Asked, Counted, Slot, attention_with_statistics, seen_by
from madtp.tokens.state import marked_first
from madtp.tokens.windows import from_windows, in_windows


def attention_with_sampled_statistics(
    inputs: AttentionInputs, asked: Asked
) -> tuple[Tensor, AttentionStatistics[Tensor]]:
    """Return the output of an attention together with the statistics of DTP from ``asked.queries`` of its queries.

    Queries are spaced over those of each sample that count and are not padding, so that a sample does not depend on its batch.
    All are asked where a sample has no more of them, and where the attention has dropout or a softcap.

    Args:
        inputs: those of a self-attention, as in :func:`~madtp.tokens.scored_attention.attention_with_statistics`.
        asked: what is asked.

    Returns:
        output ``[B, H, Q, Dv]`` and its statistics.
    """
    if inputs.windows is not None:
        return _within_windows(inputs, asked)
    queries = asked.queries if asked.received else 0
    length = inputs.query.size(2)
    counting = length - asked.counted if isinstance(asked.counted, int) else length
    every = queries is None or (bool(queries) and counting <= queries)
    if every or inputs.softcap is not None or inputs.dropout_p:
        return attention_with_statistics(inputs, asked)
    assert queries is not None
    mask = None if inputs.mask is None else inputs.mask[(None,) * (4 - inputs.mask.dim())]
    if mask is not None and hides_nothing(mask):
        mask = None
    if mask is not None and inputs.causal:  # torch's own attention does not take both
        order = _rows_at(None, torch.arange(length, device=mask.device)[None], True, inputs.key.size(2))
        assert order is not None
        mask, inputs = join_masks(mask, order), replace(inputs, causal=False)
    output = plain_attention(replace(inputs, mask=mask))
    plain = replace(inputs, mask=None, causal=False).ungrouped()
    asking: list[_Sample] = []
    if queries and mask is None and isinstance(asked.counted, int):
        asking.append(_all_alike(plain.query, asked.counted, queries))
    elif queries:
        asking.append(_by_sample(plain, mask, asked.counted, queries))
    if asked.class_slot is not None:
        asking.append(_query_at(plain.query, asked.class_slot))
    if not asking:
        return output, AttentionStatistics(None, None)
    scale = plain.query.size(-1) ** -0.5 if plain.scale is None else plain.scale
    scores = (joined([one.query for one in asking], 2) * scale) @ plain.key.transpose(2, 3)
    shown = _rows_at(mask, joined([one.slots for one in asking], 1), inputs.causal, plain.key.size(2))
    probabilities = _softmax(scores, shown)
    received = None
    if queries:
        strongest, weights = probabilities[:, :, :queries].amax(1), asking[0].weights
        received = strongest.sum(1) if weights is None else torch.bmm(weights.to(strongest.dtype), strongest).squeeze(1)
    if asked.class_slot is None:
        return output, AttentionStatistics(received, None)
    row = _unless_none(probabilities[:, :, -1], asked.class_slot)
    return output, AttentionStatistics(received, seen_by(row, output, 1, asked))


def _within_windows(inputs: AttentionInputs, asked: Asked) -> tuple[Tensor, AttentionStatistics[Tensor]]:
    assert inputs.windows is not None
    if inputs.mask is not None or inputs.causal:
        return attention_with_sampled_statistics(inputs.with_windows_masked(), asked)
    counted = counted_within_windows(asked, inputs.query.size(0), inputs.query.size(2), inputs.query.device)
    outputs, received = [], []
    for numbers, own in inputs.of_windows():
        own_asked = replace(asked, counted=in_windows(counted, inputs.windows, numbers, 1))
        output, statistics = attention_with_sampled_statistics(own, own_asked)
        outputs.append((numbers, output))
        if statistics.received is not None:
            received.append((numbers, statistics.received))
    return from_windows(outputs, 2), AttentionStatistics(from_windows(received, 1) if received else None, None)


def counted_within_windows(asked: Asked, batch: int, length: int, device: torch.device) -> Tensor:
    """Return which queries count, ``[B, N]``. Within windows all are asked, and there is no class attention."""
    assert asked.class_slot is None
    assert asked.queries is None
    if isinstance(asked.counted, Tensor):
        return asked.counted
    return (torch.arange(length, device=device) >= asked.counted).expand(batch, length)


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
    """Some queries ``[B, H, n, D]``, their slots ``[B, n]``, and whether each counts ``[B, 1, n]``; None if all do."""

    query: Tensor
    slots: Tensor
    weights: Tensor | None = None


def _all_alike(query: Tensor, counted: int, queries: int) -> _Sample:
    """The same positions of all samples, which have no padding: spaced over all but the first ``counted``."""
    chosen = counted + _evenly_spaced(queries, query.size(2) - counted, query.device)
    return _Sample(query.index_select(2, chosen), chosen.expand(query.size(0), queries))


def _by_sample(inputs: AttentionInputs, mask: Tensor | None, counted: Counted, queries: int) -> _Sample:
    """Positions of each sample, spaced over the keys that its mask shows, and of these over the tokens that count."""
    batch, heads, length, width = inputs.query.shape
    visible = None if mask is None else valid_keys(mask, batch, length)
    if visible is None:
        visible = torch.ones(batch, length, dtype=torch.bool, device=inputs.query.device)
    visible = visible & (
        counted if isinstance(counted, Tensor) else torch.arange(length, device=visible.device) >= counted
    )
    rank = _evenly_spaced(queries, visible.sum(1, keepdim=True), visible.device)
    slots = marked_first(visible).gather(1, rank)
    # A sample with fewer tokens than queries is asked for some of them twice.
    fresh = torch.cat([torch.ones_like(rank[:, :1], dtype=torch.bool), rank[:, 1:] != rank[:, :-1]], 1)
    taken = inputs.query.gather(2, slots[:, None, :, None].expand(batch, heads, queries, width))
    counts = counted.gather(1, slots) if isinstance(counted, Tensor) else slots >= counted
    return _Sample(taken, slots, (counts & fresh).unsqueeze(1))


def _rows_at(mask: Tensor | None, slots: Tensor, causal: bool, keys: int) -> Tensor | None:
    """The rows of a mask ``[B, H, Q, K]``, of which sizes may be 1, for the queries at ``slots [B, n]``."""
    if mask is not None and mask.size(2) > 1:
        batch, count = slots.shape
        rows = slots[:, None, :, None].expand(batch, mask.size(1), count, mask.size(3))
        mask = mask.expand(batch, -1, -1, -1).gather(2, rows)
    if causal:
        order = slots[:, None, :, None] >= torch.arange(keys, device=slots.device)
        mask = order if mask is None else join_masks(mask, order)
    return mask


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


def _query_at(query: Tensor, slot: Slot) -> _Sample:
    """The query ``[B, H, 1, D]`` at a slot of each sample; any query where the slot is -1."""
    batch = query.size(0)
    if isinstance(slot, int):
        slot = max(slot, 0)
        return _Sample(query[:, :, slot : slot + 1], torch.full((batch, 1), slot, device=query.device))
    slot = slot.clamp_min(0)
    own = query[torch.arange(batch, device=query.device), :, slot].unsqueeze(2)
    return _Sample(own, slot.unsqueeze(1))


def _unless_none(row: Tensor, slot: Slot) -> Tensor:
    """A row of the map ``[B, H, N]``, zero for samples whose slot is -1."""
    if isinstance(slot, int):
        return row if slot >= 0 else torch.zeros_like(row)
    return row.masked_fill((slot < 0)[:, None, None], 0.0)
