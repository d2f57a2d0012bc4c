"""Token state: which original tokens the slots of a pruned stream hold, and the operations that follow from it.

Start at :class:`TokenState`. A pruning site turns one state into the next; every operation here takes the state of
the tokens it works on. While nothing was pruned (``index is None``) each of them does what the original operation does, so a
pruned model with pruning off computes exactly what the original computes.

Axis legend: B samples, N slots now, N0 tokens before the first site, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from madtp.tokens.host_tokens import HostTokens
from madtp.tokens.packed_rows import PackedRows, packed_rows, part_of_rows


@dataclass(frozen=True)
class Quirks:
    """What the authors' code does with pruned tokens and the default does not (``docs/deviations.md``).

    Attributes:
        reads_slots: a position that the graph computes, such as the end-of-text index, is read as a slot, whatever token
            stands there now (``readout="original"``).
        ignores_cross_masks: cross-attention to these tokens ignores its mask (``cross_mask="ignored"``).
    """

    reads_slots: bool = False
    ignores_cross_masks: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenState:
    """What the N slots of a stream hold.

    Attributes:
        full_length: N0, the number of tokens before the first site.
        length: N, the number of slots.
        batch: B, the number of samples.
        index: ``[B, N]`` original position of each slot; for a merged token, the position it stands for. None if nothing was
            pruned, so that slot j holds token j.
        valid: ``[B, N]`` bool, False where a slot is padding. None if all slots are valid.
        merged: ``[B, N]`` bool, True where a slot holds a merged token. None if nothing was pruned.
        mask_index: ``[B, N]`` positions at which attention masks are read where they differ from ``index``, as in the
            authors' code (``mask_order="sorted"``, ``causal_mask="cropped"``). None elsewhere.
        quirks: what the authors' code does with pruned tokens and the default does not; None for nothing.
        rows: where the rows of the packed form stand; None if they are the slots, padding included.
        static: counts were fixed beforehand, so shapes must not depend on values.
        padding_known: a site has left out what its block's mask hides, so that the mask need not be asked again.
        host: ``index`` and ``merged`` on the host. None, or out of date, if the state was not made by a site.
    """

    full_length: int
    length: int
    batch: int
    index: Tensor | None = None
    valid: Tensor | None = None
    merged: Tensor | None = None
    mask_index: Tensor | None = None
    quirks: Quirks | None = None
    rows: PackedRows | None = None
    static: bool = False
    padding_known: bool = False
    host: HostTokens | None = None

    @property
    def counts(self) -> Tensor:
        """``[B]`` tokens of each sample; padding counts only while nothing was pruned."""
        if self.index is None or self.valid is None:
            device = None if self.index is None else self.index.device
            return torch.full((self.batch,), self.length, device=device)
        return self.valid.sum(1)


def unpruned_state(batch: int, length: int) -> TokenState:
    """Return the state of ``length`` tokens of which none was pruned."""
    return TokenState(full_length=length, length=length, batch=batch)


def kept_positions(state: TokenState) -> Tensor:
    """Return which original tokens survive, ``[B, N0]`` bool; a merged token counts for none of its members."""
    if state.index is None:
        return torch.ones(state.batch, state.full_length, dtype=torch.bool)
    real = torch.ones_like(state.index, dtype=torch.bool) if state.valid is None else state.valid
    if state.merged is not None:
        real = real & ~state.merged
    return _slot_of_each(state, real) >= 0


def _slot_of_each(state: TokenState, real: Tensor) -> Tensor:
    """The slot ``[B, N0]`` in which each original token stands, among the ``real [B, N]`` ones; -1 where there is none."""
    assert state.index is not None
    slots = torch.arange(state.length, device=real.device).expand(state.batch, state.length)
    # Other slots write to a position behind the last.
    place = state.index.masked_fill(~real, state.full_length)
    empty = slots.new_full((state.batch, state.full_length + 1), -1)
    return empty.scatter(1, place, slots)[:, : state.full_length]


def written_back(full: Tensor, values: Tensor, state: TokenState, real: Tensor) -> Tensor:
    """Return ``full [B, N0, ...]`` with the values of tokens written to their original positions.

    Args:
        full: what other positions hold.
        values: ``[B, N, ...]`` along ``state``.
        state: the state of the tokens.
        real: ``[B, N]`` bool, the slots that are written back.
    """
    slot = _slot_of_each(state, real)
    rows = torch.arange(state.batch, device=slot.device)[:, None]
    placed = values[rows, slot.clamp_min(0)].to(full.dtype)
    return torch.where((slot >= 0)[(...,) + (None,) * (full.dim() - 2)], placed, full)


def positions_of(state: TokenState, device: torch.device) -> Tensor:
    """Return the original position of the token in each slot, ``[B, N]``."""
    if state.index is not None:
        return state.index
    return torch.arange(state.length, device=device).expand(state.batch, state.length)


def hide_dropped(state: TokenState, survivors: Tensor) -> TokenState:
    """Return the state in which every token keeps its slot and all but ``survivors [B, N]`` are padding."""
    index, merged = positions_of(state, survivors.device), state.merged
    return replace(
        state, index=index, valid=survivors, merged=torch.zeros_like(survivors) if merged is None else merged, rows=None
    )


def marked_first(marked: Tensor) -> Tensor:
    """Return the order ``[B, N]`` in which marked slots come first, each part in its own order.

    By ``topk`` of keys that differ, because exporters know no stable sort.
    """
    length = marked.size(1)
    behind = torch.arange(length, 0, -1, device=marked.device)
    return (marked.long() * length + behind).topk(length, dim=1).indices


def state_length(state: TokenState) -> int:
    """Return N, the number of slots."""
    return state.length


def full_length(state: TokenState) -> int:
    """Return N0, the number of tokens before the first site."""
    return state.full_length


def align(side: Tensor, state: TokenState, dim: int, batch_dim: int, rank: int, heads: int = 1) -> Tensor:
    """Gather a side input (a mask, a position table) so that it fits the surviving tokens.

    Args:
        side: tensor that broadcasts to ``rank`` dimensions, with size N0 (or 1) at ``dim``.
        state: the state of the tokens.
        dim: token dimension of the broadcast result.
        batch_dim: batch dimension of the broadcast result.
        rank: number of dimensions of the broadcast result.
        heads: rows of each sample at ``batch_dim``, next to each other, where heads are folded into the batch.

    Returns:
        ``side`` with N at ``dim`` and ``B * heads`` at ``batch_dim``.
    """
    if state.index is None:
        return side
    return gather_positions(side, _each_head(state.index, heads), dim, batch_dim, rank)


def _each_head(index: Tensor, heads: int) -> Tensor:
    return index if heads == 1 else index.repeat_interleave(heads, 0)


def gather_positions(side: Tensor, index: Tensor, dim: int, batch_dim: int, rank: int) -> Tensor:
    """Read ``side``, which broadcasts to ``rank`` dimensions, at ``index [B, N]`` along ``dim``."""
    full = side[(None,) * (rank - side.dim())]
    if full.size(dim) == 1:
        return side
    moved = full.movedim((batch_dim, dim), (0, 1))
    if moved.size(0) == 1:
        gathered = moved[0][index]
    else:
        gathered = moved[torch.arange(index.size(0), device=index.device)[:, None], index]
    return gathered.movedim((0, 1), (batch_dim, dim))


def realign(
    values: Tensor, before: TokenState, state: TokenState, dim: int, batch_dim: int, rank: int, heads: int = 1
) -> Tensor:
    """Gather values that were computed for the tokens of an earlier state, so that they fit the tokens of ``state``.

    A merged token reads the value at the position it stands for.

    Args:
        values: along ``before`` at ``dim``.
        before: an earlier state of the same stream.
        state: the present state.
        dim: as in :func:`align`.
        batch_dim: as in :func:`align`.
        rank: as in :func:`align`.
        heads: as in :func:`align`.
    """
    if state.index is None:
        return values
    if before.index is None:
        return align(values, state, dim, batch_dim, rank, heads)
    assert before.merged is not None
    position = before.index.masked_fill(before.merged, -1)
    hit = state.index[:, :, None] == position[:, None, :]
    fallback = state.index[:, :, None] == before.index[:, None, :]
    slot = torch.where(hit.any(2), hit.int().argmax(2), fallback.int().argmax(2))
    return gather_positions(values, _each_head(slot, heads), dim, batch_dim, rank)


def slots_of(state: TokenState, positions: Tensor) -> Tensor:
    """Return the slots ``[B]`` that hold the tokens of the original ``positions [B]``, which are protected and so survive."""
    if state.index is None:
        return positions
    if state.quirks is not None and state.quirks.reads_slots:
        return positions.clamp(max=state.length - 1)
    return _holding(state.index, state, positions).int().argmax(1)


def slots_if_held(state: TokenState, positions: Tensor) -> Tensor:
    """Return the slots ``[B]`` that hold the tokens of the original ``positions [B]``; -1 where no slot does."""
    if state.index is None:
        return torch.where((positions >= 0) & (positions < state.length), positions, -1)
    if state.quirks is not None and state.quirks.reads_slots:
        return slots_of(state, positions)
    hit = _holding(state.index, state, positions)
    return torch.where(hit.any(1), hit.int().argmax(1), -1)


def _holding(index: Tensor, state: TokenState, positions: Tensor) -> Tensor:
    """Which slots ``[B, N]`` hold the tokens of the original ``positions [B]`` themselves."""
    hit = index == positions[:, None].to(index.dtype)
    return hit if state.merged is None else hit & ~state.merged


def read_position(values: Tensor, state: TokenState, dim: int, batch_dim: int, position: int) -> Tensor:
    """Return the values of the token at the original ``position``, counted from the end if negative; drops ``dim``."""
    if state.index is None:
        return values.select(dim, position)
    if position < 0:
        position += state.full_length
    return read_each(values, state, dim, batch_dim, torch.full((state.batch,), position, device=values.device))


def read_each(values: Tensor, state: TokenState, dim: int, batch_dim: int, positions: Tensor) -> Tensor:
    """Return the values of the token at the original ``positions [B]``, one of each sample; drops ``dim``."""
    moved = values.movedim((batch_dim, dim), (0, 1))
    read = moved[torch.arange(state.batch, device=values.device), slots_of(state, positions)]
    return read.movedim(0, batch_dim if batch_dim < dim else batch_dim - 1)


def pool(
    values: Tensor, state: TokenState, dim: int, batch_dim: int, how: Literal["mean", "amax"], keepdim: bool
) -> Tensor:
    """Return the mean or the maximum over the surviving tokens, without padding slots."""
    if state.index is None or state.valid is None:
        return values.mean(dim, keepdim) if how == "mean" else values.amax(dim, keepdim)
    mask = along(state.valid, values.dim(), dim, batch_dim)
    if how == "amax":
        return values.masked_fill(~mask, float("-inf")).amax(dim, keepdim)
    total = values.masked_fill(~mask, 0).sum(dim, keepdim)
    return total / mask.sum(dim, keepdim).clamp(min=1).to(values.dtype)


def along(valid: Tensor, rank: int, dim: int, batch_dim: int) -> Tensor:
    """Return ``valid [B, N]`` reshaped to ``rank`` dimensions with B at ``batch_dim`` and N at ``dim``."""
    shape = [1] * rank
    shape[batch_dim], shape[dim] = valid.shape
    return (valid if batch_dim < dim else valid.t()).reshape(shape)


def masked_mean(
    values: Tensor,
    weights: Tensor,
    dim: int,
    keepdim: bool,
    minimum: float | None,
    state: TokenState | None = None,
    batch_dim: int = 0,
) -> Tensor:
    """Return the weighted mean of ``values`` over the surviving tokens.

    Args:
        values: along ``state`` at ``dim``.
        weights: the model's own mask over the original tokens, of the same rank, with N0 or 1 entries at ``dim``.
        dim: token dimension.
        keepdim: keep ``dim`` with size 1.
        minimum: lower bound on the sum of the weights; None for no bound.
        state: the state of the tokens; None if nothing was pruned.
        batch_dim: batch dimension.
    """
    if state is not None and state.index is not None:
        weights = gather_positions(weights, state.index, dim, batch_dim, values.dim())
        if state.valid is not None:
            weights = weights.masked_fill(~along(state.valid, values.dim(), dim, batch_dim), 0)
    total = weights.sum(dim, keepdim)
    if minimum is not None:
        total = total.clamp(min=minimum)
    return (values * weights).sum(dim, keepdim) / total


def suffix_state(state: TokenState, start: int) -> TokenState:
    """Return the state of ``values[start:]`` where the first ``start`` tokens are protected, so that they still come first."""
    state = replace(state, rows=None)
    length, full = state.length - start, state.full_length - start
    if state.index is None:
        return replace(state, full_length=full, length=length)
    cut = map_tensors(state, lambda tensor: tensor[:, start:])
    assert cut.index is not None
    mask_index = None if cut.mask_index is None else cut.mask_index - start
    return replace(cut, index=cut.index - start, mask_index=mask_index, full_length=full, length=length)


def _rows(state: TokenState, start: int, end: int) -> TokenState:
    """The state of the samples ``start`` to ``end``."""
    first, last = samples_between(state, start, end)
    rows = None if state.rows is None else part_of_rows(state.rows, state.length, first, last)
    return replace(map_tensors(state, lambda tensor: tensor[start:end]), batch=max(0, last - first), rows=rows)


def samples_between(state: TokenState, start: int | None, end: int | None) -> tuple[int, int]:
    """Return the first sample of ``values[start:end]``, and the one behind its last. The batch size may be symbolic."""

    def bound(at: int) -> int:
        return max(0, min(at + state.batch if at < 0 else at, state.batch))

    return 0 if start is None else bound(start), state.batch if end is None else bound(end)


def map_tensors(state: TokenState, change: Callable[[Tensor], Tensor]) -> TokenState:
    """Return the state with ``change`` applied to each of its tensors."""
    index, valid, merged, mask_index = (
        None if field is None else change(field) for field in (state.index, state.valid, state.merged, state.mask_index)
    )
    return replace(state, index=index, valid=valid, merged=merged, mask_index=mask_index)


def batch_slice(state: TokenState, start: int | None, end: int | None) -> TokenState:
    """Return the state of ``values[start:end]`` along the batch."""
    return _rows(state, start or 0, state.batch if end is None else end)


def batch_chunk(state: TokenState, chunks: int, part: int) -> TokenState:
    """Return the state of ``values.chunk(chunks)[part]`` along the batch."""
    step = -(-state.batch // chunks)
    return _rows(state, part * step, (part + 1) * step)


def batch_split(state: TokenState, sizes: int | Sequence[int], part: int) -> TokenState:
    """Return the state of ``values.split(sizes)[part]`` along the batch."""
    if isinstance(sizes, int):
        return _rows(state, part * sizes, (part + 1) * sizes)
    return _rows(state, sum(sizes[:part]), sum(sizes[: part + 1]))


def batch_repeat(state: TokenState, times: int) -> TokenState:
    """Return the state of ``values.repeat_interleave(times)`` along the batch."""
    rows = None
    if state.rows is not None:
        lengths = [length for length in state.rows.lengths for _ in range(times)]
        rows = packed_rows(lengths, state.length, state.rows.slots.device)
    repeated = map_tensors(state, lambda tensor: tensor.repeat_interleave(times, 0))
    return replace(repeated, batch=state.batch * times, rows=rows)


def restore(
    values: Tensor, state: TokenState, dim: int, batch_dim: int, earlier: Sequence[tuple[Tensor, TokenState | None]]
) -> Tensor:
    """Scatter the surviving tokens back to their original positions; a dropped token has the last value it had.

    Args:
        values: tokens along ``state``.
        state: the state of the tokens.
        dim: token dimension.
        batch_dim: batch dimension.
        earlier: the stream's values just before each site so far, in order, each with the state that it runs along (None
            before the first site).

    Returns:
        ``values`` with N0 tokens at ``dim``.
    """
    if state.index is None:
        return values
    full = earlier[0][0].movedim((batch_dim, dim), (0, 1))
    for past, past_state in (*earlier[1:], (values, state)):
        if past_state is None or past_state.index is None:
            full = past.movedim((batch_dim, dim), (0, 1))
            continue
        assert past_state.merged is not None
        real = ~past_state.merged if past_state.valid is None else past_state.valid & ~past_state.merged
        full = written_back(full, past.movedim((batch_dim, dim), (0, 1)), past_state, real)
    return full.movedim((0, 1), (batch_dim, dim))
