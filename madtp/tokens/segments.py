"""Parts of a stream along its tokens: ranges, concatenations, and the segments of a stream that several modalities share.

Start at :func:`join_states`. Positions count in the stream's original tokens; what was pruned before stays pruned.

Axis legend: B samples, N slots now, N0 original tokens, L slots of a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from madtp.tokens.state import TokenState, each_field, gather_positions, positions_of, untouched


@dataclass(frozen=True)
class SegmentMap:
    """Which token of a stream is of which segment.

    ids: ``[N0]`` or ``[B, N0]`` number of the segment of each original position. special: ``[N0]`` True at learned tokens
    (the class token of the image part), which are never pruned; None if there are none.
    """

    ids: Tensor
    special: Tensor | None = None


def concatenated(
    lengths: Sequence[int], numbers: Sequence[int], special: Sequence[Sequence[int]], like: Tensor
) -> SegmentMap:
    """The map of tokens concatenated one part after the other.

    Args:
        lengths: tokens of each part. numbers: its segment. special: positions in it that hold learned tokens.
        like: a tensor on the device of the tokens.
    """
    ids = torch.cat([torch.full((n,), number, device=like.device) for n, number in zip(lengths, numbers, strict=True)])
    marks = torch.zeros(ids.shape, dtype=torch.bool, device=like.device)
    offset = 0
    for length, places in zip(lengths, special, strict=True):
        marks[[offset + place for place in places]] = True
        offset += length
    return SegmentMap(ids, marks)


def scattered(mask: Tensor) -> SegmentMap:
    """The map of a sequence into which the tokens of another modality were written where ``mask [B, N0, ...]`` is true:
    segment 0 outside, segment 1 inside."""
    return SegmentMap(mask.reshape(*mask.shape[:2], -1)[:, :, 0].long())


def segment_slots(segments: SegmentMap, state: TokenState) -> Tensor:
    """``[B, N]`` segment of each slot; a merged token is of the segment it was merged from."""
    ids = segments.ids.expand(state.batch, state.full_length)
    return ids if state.index is None else ids.gather(1, state.index)


def special_slots(segments: SegmentMap, protected: Sequence[Sequence[int]], state: TokenState) -> Tensor:
    """``[B, N]`` slots of learned tokens, and of the ``protected`` positions counted within each segment."""
    ids = segments.ids.expand(state.batch, state.full_length)
    marks = torch.zeros_like(ids, dtype=torch.bool)
    if segments.special is not None:
        marks = marks | segments.special
    for number, places in enumerate(protected):
        inside = ids == number
        rank = inside.cumsum(1) - 1
        for place in places:
            marks = marks | (inside & (rank == place))
    return marks if state.index is None else marks.gather(1, state.index)


def _inside(state: TokenState, start: int | None, end: int | None) -> tuple[Tensor, Tensor, int, int]:
    """Slots ``[B, L]`` of the tokens in ``[start, end)``, in order, which of them are no padding, and the bounds."""
    first, last, _ = slice(start, end).indices(state.full_length)
    assert state.index is not None
    inside = (state.index >= first) & (state.index < last)
    if state.valid is not None:
        inside = inside & state.valid
    order = inside.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    counts = inside.sum(1)
    length = max(1, int(counts.max()))
    alive = torch.arange(length, device=inside.device) < counts[:, None]
    return order[:, :length], alive, first, last


def cut_range(
    values: Tensor, state: TokenState, dim: int, batch_dim: int, start: int | None, end: int | None
) -> Tensor:
    """``values[start:end]`` along the tokens, in original positions: those among the surviving ones."""
    if state.index is None:
        return values[(slice(None),) * dim + (slice(start, end),)]
    slots, _, _, _ = _inside(state, start, end)
    return gather_positions(values, slots, dim, batch_dim, values.dim())


def cut_ranges(values: Tensor, state: TokenState, dim: int, batch_dim: int, starts: Sequence[int]) -> list[Tensor]:
    """``values`` cut in front of each of ``starts``, the first of which is 0."""
    bounds = zip(starts, [*starts[1:], None], strict=True)
    return [cut_range(values, state, dim, batch_dim, start, end) for start, end in bounds]


def range_state(state: TokenState, start: int | None, end: int | None) -> TokenState:
    """The state of what :func:`cut_range` yields."""
    if state.index is None:
        length = len(range(*slice(start, end).indices(state.full_length)))
        return replace(state, full_length=length, length=length)
    slots, alive, first, last = _inside(state, start, end)
    inner = each_field(state, lambda field: field.gather(1, slots))
    assert inner.index is not None
    return replace(
        inner,
        index=(inner.index - first).clamp(0, max(0, last - first - 1)),
        valid=None if bool(alive.all()) else alive,
        mask_index=None,
        full_length=last - first,
        length=slots.size(1),
    )


def join_states(parts: Sequence[TokenState | int]) -> TokenState:
    """The state of tokens concatenated one after the other; a number stands for so many tokens of an unpruned stream."""
    known = next(part for part in parts if isinstance(part, TokenState))
    states = [untouched(known.batch, part) if isinstance(part, int) else part for part in parts]
    full, length = sum(s.full_length for s in states), sum(s.length for s in states)
    pruned = next((s.index for s in states if s.index is not None), None)
    if pruned is None:
        return replace(untouched(known.batch, full), quirks=known.quirks)
    index, valid, merged, offset = [], [], [], 0
    for state in states:
        own = positions_of(state, pruned.device)
        index.append(own + offset)
        everything = torch.ones_like(own, dtype=torch.bool)
        valid.append(everything if state.valid is None else state.valid)
        merged.append(~everything if state.merged is None else state.merged)
        offset += state.full_length
    alive = torch.cat(valid, 1)
    return TokenState(
        torch.cat(index, 1),
        None if bool(alive.all()) else alive,
        torch.cat(merged, 1),
        None,
        full,
        length,
        known.batch,
        known.quirks,
    )
