"""Ranges and concatenations of tokens, and the segments of a stream that several modalities share.

Start at :func:`join_states`. Positions are those of the stream's original tokens; what was pruned before stays pruned.

Axis legend: B samples, N slots now, N0 original tokens, L slots of a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from madtp.tokens.state import (
    TokenState,
    gather_positions,
    map_tensors,
    marked_first,
    positions_of,
    unpruned_state,
)


@dataclass(frozen=True)
class SegmentMap:
    """Which token of a stream belongs to which segment.

    Attributes:
        ids: ``[N0]`` or ``[B, N0]``, the number of the segment of each original token.
        special: ``[N0]`` bool, True at learned tokens, such as the class token of the image part, which are never pruned.
            None if there are none.
    """

    ids: Tensor
    special: Tensor | None = None


def concatenated_segments(
    lengths: Sequence[int], numbers: Sequence[int], special: Sequence[Sequence[int]], like: Tensor
) -> SegmentMap:
    """Return the map of a stream whose parts were concatenated.

    Args:
        lengths: number of tokens of each part.
        numbers: number of the segment of each part.
        special: positions of learned tokens in each part.
        like: a tensor on the device of the tokens.
    """
    ids = torch.cat([torch.full((n,), number, device=like.device) for n, number in zip(lengths, numbers, strict=True)])
    if not any(special):
        return SegmentMap(ids)
    learned = torch.zeros(ids.shape, dtype=torch.bool, device=like.device)
    offset = 0
    for length, positions in zip(lengths, special, strict=True):
        learned[[offset + position for position in positions]] = True
        offset += length
    return SegmentMap(ids, learned)


def scattered_segments(mask: Tensor) -> SegmentMap:
    """Return the map of a text sequence with image features where ``mask [B, N0, ...]`` is True.

    Segment 0 is the text, segment 1 the image.
    """
    return SegmentMap(mask.reshape(*mask.shape[:2], -1)[:, :, 0].long())


def segment_slots(segments: SegmentMap, state: TokenState) -> Tensor:
    """Return the segment of each slot, ``[B, N]``; a merged token belongs to the segment of its members."""
    ids = segments.ids.expand(state.batch, state.full_length)
    return ids if state.index is None else ids.gather(1, state.index)


def run_slots(segments: SegmentMap, number: int, state: TokenState) -> Tensor:
    """Return which run of tokens of a segment each slot belongs to, ``[B, N]``, from 0; -1 for other tokens.

    An image among words is such a run.
    """
    inside = segments.ids.expand(state.batch, state.full_length) == number
    runs = _numbers_of_runs(inside) - 1
    return runs if state.index is None else runs.gather(1, state.index)


def _numbers_of_runs(inside: Tensor) -> Tensor:
    """The number of the run of True that each place of ``inside [B, N]`` is in, from 1; 0 outside."""
    before = torch.cat([torch.zeros_like(inside[:, :1]), inside[:, :-1]], 1)
    return (inside & ~before).cumsum(1) * inside


def small_runs(inside: Tensor, dropped: Tensor, least: int) -> Tensor:
    """Return which tokens are in runs, such as those of one image among words, of which fewer than ``least`` are left.

    Args:
        inside: ``[B, N]`` bool, the tokens of all runs.
        dropped: ``[B, N]`` bool, those of them that were dropped.
        least: how many have to be left of each run.
    """
    number = _numbers_of_runs(inside)
    left = torch.zeros_like(number).scatter_add_(1, number, (inside & ~dropped).long())
    return inside & (left.gather(1, number) < least)


def special_slots(segments: SegmentMap, protected: Sequence[Sequence[int]], state: TokenState) -> Tensor:
    """Return which slots hold learned tokens or protected ones, ``[B, N]``.

    Args:
        segments: the segments of the stream.
        protected: positions in each segment, counted within it.
        state: the state of the tokens.
    """
    ids = segments.ids.expand(state.batch, state.full_length)
    found = torch.zeros_like(ids, dtype=torch.bool)
    if segments.special is not None:
        found = found | segments.special
    for number, positions in enumerate(protected):
        inside = ids == number
        rank = inside.cumsum(1) - 1
        for position in positions:
            found = found | (inside & (rank == position))
    return found if state.index is None else found.gather(1, state.index)


@dataclass(frozen=True)
class _Range:
    """Surviving tokens in ``[start, end)`` of the original ones.

    Attributes:
        start: first original position.
        end: behind the last original position.
        slots: ``[B, L]`` slots of the tokens, in order.
        valid: ``[B, L]`` False where a sample has fewer than L tokens in the range.
    """

    start: int
    end: int
    slots: Tensor
    valid: Tensor


def _slots_between(state: TokenState, first: int, last: int) -> Tensor:
    """Which slots ``[B, N]`` hold tokens whose original positions are from ``first`` to ``last``."""
    assert state.index is not None
    inside = (state.index >= first) & (state.index < last)
    return inside if state.valid is None else inside & state.valid


def _range(state: TokenState, start: int | None, end: int | None) -> _Range:
    first, last, _ = slice(start, end).indices(state.full_length)
    inside = _slots_between(state, first, last)
    order = marked_first(inside)
    counts = inside.sum(1)
    # With fixed counts the length must not depend on values; a range holds its tokens and merged ones.
    length = state.length if state.static else max(1, int(counts.max()))
    valid = torch.arange(length, device=inside.device) < counts[:, None]
    return _Range(first, last, order[:, :length], valid)


def cut_range(
    values: Tensor, state: TokenState, dim: int, batch_dim: int, start: int | None, end: int | None
) -> Tensor:
    """Return ``values[start:end]`` along the tokens, in original positions: the survivors among them."""
    if state.index is None:
        return values[(slice(None),) * dim + (slice(start, end),)]
    return gather_positions(values, _range(state, start, end).slots, dim, batch_dim, values.dim())


def cut_ranges(values: Tensor, state: TokenState, dim: int, batch_dim: int, starts: Sequence[int]) -> list[Tensor]:
    """Return the parts of ``values`` that begin at each of ``starts``, the first of which is 0."""
    bounds = zip(starts, [*starts[1:], None], strict=True)
    return [cut_range(values, state, dim, batch_dim, start, end) for start, end in bounds]


def rejoin(parts: Sequence[Tensor], state: TokenState, dim: int, batch_dim: int, starts: Sequence[int]) -> Tensor:
    """Return the tokens of ``state`` in their slots; ``parts`` are what became of :func:`cut_ranges` of them.

    Padding slots hold the values of any token.
    """
    joined = torch.cat(list(parts), dim)
    if state.index is None:
        return joined
    place, offset = torch.zeros_like(state.index), 0
    for part, start, end in zip(parts, starts, [*starts[1:], None], strict=True):
        first, last, _ = slice(start, end).indices(state.full_length)
        inside = _slots_between(state, first, last)
        place = torch.where(inside, inside.cumsum(1) - 1 + offset, place)
        offset += part.size(dim)
    return gather_positions(joined, place, dim, batch_dim, joined.dim())


def range_state(state: TokenState, start: int | None, end: int | None) -> TokenState:
    """Return the state of what :func:`cut_range` returns."""
    if state.index is None:
        length = len(range(*slice(start, end).indices(state.full_length)))
        return replace(state, full_length=length, length=length)
    cut = _range(state, start, end)
    inner = map_tensors(replace(state, rows=None), lambda tensor: tensor.gather(1, cut.slots))
    assert inner.index is not None
    return replace(
        inner,
        index=(inner.index - cut.start).clamp(0, max(0, cut.end - cut.start - 1)),
        valid=cut.valid if state.static else _unless_all(cut.valid),
        mask_index=None,
        full_length=cut.end - cut.start,
        length=cut.slots.size(1),
    )


def join_states(parts: Sequence[TokenState | int]) -> TokenState:
    """Return the state of concatenated tokens; an integer stands for that many tokens of a stream that is not pruned."""
    known = next(part for part in parts if isinstance(part, TokenState))
    states = [unpruned_state(known.batch, part) if isinstance(part, int) else part for part in parts]
    full, length = sum(s.full_length for s in states), sum(s.length for s in states)
    pruned = next((s.index for s in states if s.index is not None), None)
    if pruned is None:
        return replace(unpruned_state(known.batch, full), quirks=known.quirks)
    index, valid, merged, offset = [], [], [], 0
    for state in states:
        own = positions_of(state, pruned.device)
        index.append(own + offset)
        everything = torch.ones_like(own, dtype=torch.bool)
        valid.append(everything if state.valid is None else state.valid)
        merged.append(~everything if state.merged is None else state.merged)
        offset += state.full_length
    static = any(state.static for state in states)
    all_valid = torch.cat(valid, 1)
    return TokenState(
        full_length=full,
        length=length,
        batch=known.batch,
        index=torch.cat(index, 1),
        valid=_joined_valid(states, all_valid) if static else _unless_all(all_valid),
        merged=torch.cat(merged, 1),
        quirks=known.quirks,
        static=static,
    )


def _unless_all(valid: Tensor) -> Tensor | None:
    return None if bool(valid.all()) else valid


def _joined_valid(states: Sequence[TokenState], valid: Tensor) -> Tensor | None:
    """Which slots of a joined stream with fixed counts are valid; None if no part has padding."""
    return None if all(state.valid is None for state in states) else valid
