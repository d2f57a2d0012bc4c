"""Token state: which original tokens the slots of a pruned stream hold, and the operations that follow from it.

Start at :class:`TokenState`. A pruning site turns one state into the next; every operation here takes the state of
the tokens it works on. With the state that nothing was pruned (``index is None``) each of them returns its input
untouched, so that an inactive pruned model computes exactly what the original computes.

Axis legend: B samples, N slots now, N0 tokens before the first site, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quirks:
    """What the authors' code does with pruned tokens and our default does not (docs/deviations.md).

    reads_slots: a position that the graph computes (the end-of-text index) is read as a slot, whatever token stands there now.
    ignores_cross_masks: cross-attention to these tokens takes no notice of its mask.
    """

    reads_slots: bool = False
    ignores_cross_masks: bool = False


NO_QUIRKS = Quirks()


@dataclass(frozen=True)
class TokenState:
    """What the N slots of a stream hold.

    Attributes:
        index: ``[B, N]`` original position of each slot (for a merged token the position it stands for); None: nothing
            was pruned and slot j holds token j.
        valid: ``[B, N]`` False where a slot is padding; None: all are valid.
        merged: ``[B, N]`` True where a slot holds a merged token.
        mask_index: ``[B, N]`` positions by which attention masks are gathered where they differ from ``index`` (the
            official behaviour: ``mask_order="sorted"``, ``causal_mask="cropped"``); else None.
        full_length: N0.
        length: N.
        batch: B.
        quirks: further official behaviour.
    """

    index: Tensor | None
    valid: Tensor | None
    merged: Tensor | None
    mask_index: Tensor | None
    full_length: int
    length: int
    batch: int
    quirks: Quirks = NO_QUIRKS

    @property
    def counts(self) -> Tensor:
        """``[B]`` tokens of each sample, padding left out once something was pruned."""
        if self.index is None or self.valid is None:
            device = None if self.index is None else self.index.device
            return torch.full((self.batch,), self.length, device=device)
        return self.valid.sum(1)


def untouched(batch: int, length: int) -> TokenState:
    """The state before any pruning."""
    return TokenState(None, None, None, None, length, length, batch)


def kept_positions(state: TokenState) -> Tensor:
    """``[B, N0]`` which original tokens the slots hold; merged ones do not count."""
    if state.index is None:
        return torch.ones(state.batch, state.full_length, dtype=torch.bool)
    kept = torch.zeros(state.batch, state.full_length, dtype=torch.bool, device=state.index.device)
    real = torch.ones_like(kept[:, : state.length]) if state.valid is None else state.valid
    if state.merged is not None:
        real = real & ~state.merged
    rows, slots = real.nonzero(as_tuple=True)
    kept[rows, state.index[rows, slots]] = True
    return kept


def positions_of(state: TokenState, device: torch.device) -> Tensor:
    """``[B, N]`` the original position of the token in each slot."""
    if state.index is not None:
        return state.index
    return torch.arange(state.length, device=device).expand(state.batch, state.length)


def marked(state: TokenState, survivors: Tensor) -> TokenState:
    """The state in which every token keeps its slot and all but ``survivors [B, N]`` are padding."""
    index, merged = positions_of(state, survivors.device), state.merged
    return replace(
        state, index=index, valid=survivors, merged=torch.zeros_like(survivors) if merged is None else merged
    )


def state_length(state: TokenState) -> int:
    """Number of slots N."""
    return state.length


def full_length(state: TokenState) -> int:
    """Number of tokens N0 that the stream had."""
    return state.full_length


def align(side: Tensor, state: TokenState, dim: int, batch_dim: int, rank: int, heads: int = 1) -> Tensor:
    """Gather a side input along its token dimension so that it fits the surviving tokens.

    Args:
        side: tensor that broadcasts to ``rank`` dimensions; its size at ``dim`` is N0.
        dim, batch_dim: token and batch dimension in the broadcast result.
        heads: rows of each sample at ``batch_dim``, one after the other.
    Returns:
        ``side`` with ``rank`` dimensions, N at ``dim`` and B times ``heads`` at ``batch_dim``.
    """
    if state.index is None:
        return side
    return gather_positions(side, _each_head(state.index, heads), dim, batch_dim, rank)


def _each_head(index: Tensor, heads: int) -> Tensor:
    return index if heads == 1 else index.repeat_interleave(heads, 0)


def gather_positions(side: Tensor, index: Tensor, dim: int, batch_dim: int, rank: int) -> Tensor:
    """``side`` (broadcastable to ``rank`` dimensions) read at ``index [B, N]`` along ``dim``."""
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
    """Carry values along an earlier state of the same stream to the present one.

    Slots that hold a merged token read the value at the position the merged token stands for.
    """
    if state.index is None:
        return values
    if before.index is None:
        return align(values, state, dim, batch_dim, rank, heads)
    assert before.merged is not None
    place = before.index.masked_fill(before.merged, -1)
    hit = state.index[:, :, None] == place[:, None, :]
    fallback = state.index[:, :, None] == before.index[:, None, :]
    slot = torch.where(hit.any(2), hit.int().argmax(2), fallback.int().argmax(2))
    return gather_positions(values, _each_head(slot, heads), dim, batch_dim, rank)


def slots_of(state: TokenState, positions: Tensor) -> Tensor:
    """Slots ``[B]`` that hold the original ``positions [B]``; these are protected, so they survive."""
    if state.index is None:
        return positions
    if state.quirks.reads_slots:
        return positions.clamp(max=state.length - 1)
    hit = state.index == positions[:, None].to(state.index.dtype)
    if state.merged is not None:
        hit = hit & ~state.merged
    return hit.int().argmax(1)


def read_position(values: Tensor, state: TokenState, dim: int, batch_dim: int, position: int) -> Tensor:
    """The values of the token that stood at the constant ``position`` (negative: from the end); drops ``dim``."""
    if state.index is None:
        return values.select(dim, position)
    if position < 0:
        position += state.full_length
    return read_each(values, state, dim, batch_dim, torch.full((state.batch,), position, device=values.device))


def read_each(values: Tensor, state: TokenState, dim: int, batch_dim: int, positions: Tensor) -> Tensor:
    """The values of the token that stood at ``positions [B]`` of each sample; drops ``dim``."""
    moved = values.movedim((batch_dim, dim), (0, 1))
    read = moved[torch.arange(state.batch, device=values.device), slots_of(state, positions)]
    return read.movedim(0, batch_dim if batch_dim < dim else batch_dim - 1)


def pool(values: Tensor, state: TokenState, dim: int, batch_dim: int, how: str, keepdim: bool) -> Tensor:
    """Mean or maximum over the surviving tokens; padding slots are left out."""
    if state.index is None or state.valid is None:
        return values.mean(dim, keepdim) if how == "mean" else values.amax(dim, keepdim)
    mask = _along(state.valid, values.dim(), dim, batch_dim)
    if how == "amax":
        return values.masked_fill(~mask, float("-inf")).amax(dim, keepdim)
    total = values.masked_fill(~mask, 0).sum(dim, keepdim)
    return total / mask.sum(dim, keepdim).clamp(min=1).to(values.dtype)


def _along(valid: Tensor, rank: int, dim: int, batch_dim: int) -> Tensor:
    """``valid [B, N]`` with ``rank`` dimensions, B at ``batch_dim`` and N at ``dim``."""
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
    """Mean of ``values`` along ``dim`` weighted by ``weights`` (same rank), over the surviving tokens."""
    if state is not None and state.index is not None:
        weights = gather_positions(weights, state.index, dim, batch_dim, values.dim())
        if state.valid is not None:
            weights = weights.masked_fill(~_along(state.valid, values.dim(), dim, batch_dim), 0)
    total = weights.sum(dim, keepdim)
    if minimum is not None:
        total = total.clamp(min=minimum)
    return (values * weights).sum(dim, keepdim) / total


def without_first(state: TokenState, start: int) -> TokenState:
    """The state of ``values[start:]``, where the first ``start`` tokens are protected and so still stand first."""
    if state.index is None:
        return replace(state, full_length=state.full_length - start, length=state.length - start)
    assert state.merged is not None
    return replace(
        state,
        index=state.index[:, start:] - start,
        valid=None if state.valid is None else state.valid[:, start:],
        merged=state.merged[:, start:],
        mask_index=None if state.mask_index is None else state.mask_index[:, start:] - start,
        full_length=state.full_length - start,
        length=state.length - start,
    )


def _rows(state: TokenState, start: int, end: int) -> TokenState:
    count = len(range(*slice(start, end).indices(state.batch)))
    return replace(each_field(state, lambda field: field[start:end]), batch=count)


def each_field(state: TokenState, change: Callable[[Tensor], Tensor]) -> TokenState:
    """The state with every tensor changed."""
    index, valid, merged, mask_index = (
        None if field is None else change(field) for field in (state.index, state.valid, state.merged, state.mask_index)
    )
    return replace(state, index=index, valid=valid, merged=merged, mask_index=mask_index)


def batch_slice(state: TokenState, start: int | None, end: int | None) -> TokenState:
    """The state of ``values[start:end]`` along the batch."""
    return _rows(state, start or 0, state.batch if end is None else end)


def batch_chunk(state: TokenState, chunks: int, part: int) -> TokenState:
    """The state of ``values.chunk(chunks)[part]`` along the batch."""
    step = -(-state.batch // chunks)
    return _rows(state, part * step, (part + 1) * step)


def batch_split(state: TokenState, sizes: int | Sequence[int], part: int) -> TokenState:
    """The state of ``values.split(sizes)[part]`` along the batch."""
    if isinstance(sizes, int):
        return _rows(state, part * sizes, (part + 1) * sizes)
    return _rows(state, sum(sizes[:part]), sum(sizes[: part + 1]))


def batch_repeat(state: TokenState, times: int) -> TokenState:
    """The state of ``values.repeat_interleave(times)`` along the batch."""

    return replace(each_field(state, lambda field: field.repeat_interleave(times, 0)), batch=state.batch * times)


def restore(
    values: Tensor, state: TokenState, dim: int, batch_dim: int, earlier: Sequence[tuple[Tensor, TokenState | None]]
) -> Tensor:
    """Scatter surviving tokens back to their places; dropped ones carry the last state they had.

    Args:
        values: tokens along ``state``.
        earlier: the stream's values just before each pruning site so far, first site first, each with the state it
            was along (None before the first site).
    Returns:
        values with N0 tokens at ``dim``.
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
        rows, slots = real.nonzero(as_tuple=True)
        moved = past.movedim((batch_dim, dim), (0, 1))
        full = full.index_put((rows, past_state.index[rows, slots]), moved[rows, slots].to(full.dtype))
    return full.movedim((0, 1), (batch_dim, dim))
