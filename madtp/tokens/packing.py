"""Values of a pruned stream in the packed form, ``[1, T, C]``, and in the padded form, ``[B, N, C]``.

Start at :func:`to_rows` and :func:`to_slots`, which go from one form to the other; ``packed_rows.py`` explains both. Side
inputs are read row by row (:func:`side_input_rows`), and parts of the batch are stretches of rows (:func:`split_rows`). Where
a state has no :class:`~madtp.tokens.packed_rows.PackedRows`, the rows are all slots and both forms are views of each other.

While nothing was pruned (``index is None``) nothing is packed: values keep the form that they have in the original, and each
function here does what the original operation does.

Axis legend: B samples, N slots of a sample, T rows, N0 original tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from madtp.tokens.state import TokenState, read_each, samples_between, slots_of, written_back


def lengths_of(state: TokenState) -> tuple[int, ...]:
    """Return the number of rows of each sample in the packed form."""
    return (state.length,) * state.batch if state.rows is None else state.rows.lengths


def samples_of(state: TokenState, device: torch.device) -> Tensor:
    """Return the sample of each row, ``[T]``."""
    if state.rows is not None:
        return state.rows.samples
    return torch.arange(state.batch, device=device).repeat_interleave(state.length)


def row_positions(state: TokenState, device: torch.device) -> Tensor:
    """Return the original position of each row, ``[T]``."""
    if state.index is None:
        return torch.arange(state.length, device=device).repeat(state.batch)
    return in_rows(state.index, state)


def in_rows(values: Tensor, state: TokenState) -> Tensor:
    """Return ``values [B, N, ...]`` as rows ``[T, ...]``."""
    flat = values.flatten(0, 1)
    return flat if state.rows is None else flat.index_select(0, state.rows.slots)


def in_slots(rows: Tensor, state: TokenState, fill: float = 0.0) -> Tensor:
    """Return ``rows [T, ...]`` in the padded form ``[B, N, ...]``, with ``fill`` on padding."""
    if state.rows is not None:
        padded = rows.new_full((state.batch * state.length, *rows.shape[1:]), fill)
        slots_of_rows = state.rows.slots
        if rows.is_floating_point() and rows.element_size() == 1:  # which a quantised cache holds, and index_copy lacks
            rows = padded.index_put((slots_of_rows,), rows)
        else:
            rows = padded.index_copy(0, slots_of_rows, rows)
    slots: Tensor = rows.unflatten(0, (state.batch, state.length))
    return slots


def to_rows(values: Tensor, state: TokenState, dim: int, batch_dim: int, heads: int = 1) -> Tensor:
    """Return values of the padded form in the packed one.

    Args:
        values: N at ``dim`` and ``B * heads`` at ``batch_dim``.
        state: the state of the tokens.
        dim: token dimension.
        batch_dim: batch dimension.
        heads: rows of each sample at ``batch_dim``, where heads are folded into the batch.

    Returns:
        T at ``dim``, and ``heads`` at ``batch_dim``.
    """
    if state.index is None:
        return values
    if heads > 1:
        values = values.unflatten(batch_dim, (state.batch, heads))
        dim = dim + 1 if dim > batch_dim else dim
    rows = in_rows(values.movedim((batch_dim, dim), (0, 1)), state)
    rows = rows.unsqueeze(0).movedim((0, 1), (batch_dim, dim))
    return rows.squeeze(batch_dim) if heads > 1 else rows


def to_slots(rows: Tensor, state: TokenState, dim: int, batch_dim: int, heads: int = 1) -> Tensor:
    """Return values of the packed form in the padded one, with zeros on padding; arguments as for :func:`to_rows`."""
    if state.index is None:
        return rows
    if heads > 1:
        rows = rows.unsqueeze(batch_dim)
        dim = dim + 1 if dim > batch_dim else dim
    values = in_slots(rows.movedim((batch_dim, dim), (0, 1)).squeeze(0), state).movedim((0, 1), (batch_dim, dim))
    return values.flatten(batch_dim, batch_dim + 1) if heads > 1 else values


def folded_to_rows(values: Tensor, state: TokenState, dim: int, tokens_first: bool) -> Tensor:
    """Return values with samples and tokens folded into one dimension in the packed form.

    Args:
        values: ``B * N`` at ``dim``.
        state: the state of the tokens.
        dim: the folded dimension.
        tokens_first: whether the first B entries are the first tokens of all samples; otherwise the first N entries are the
            tokens of the first sample.

    Returns:
        T at ``dim``.
    """
    if state.index is None:
        return values
    sizes = (state.length, state.batch) if tokens_first else (state.batch, state.length)
    slots = values.movedim(dim, 0).unflatten(0, sizes)
    return in_rows(slots.transpose(0, 1) if tokens_first else slots, state).movedim(0, dim)


def folded_to_slots(rows: Tensor, state: TokenState, dim: int, tokens_first: bool) -> Tensor:
    """Return what :func:`folded_to_rows` takes, with zeros on padding."""
    if state.index is None:
        return rows
    slots = in_slots(rows.movedim(dim, 0), state)
    return (slots.transpose(0, 1) if tokens_first else slots).flatten(0, 1).movedim(0, dim)


def side_input_rows(side: Tensor, state: TokenState, dim: int, batch_dim: int, rank: int) -> Tensor:
    """Read a side input, a mask or a position table, at the original positions of the rows.

    Args:
        side: tensor that broadcasts to ``rank`` dimensions, with N0 (or 1) at ``dim``.
        state: the state of the tokens.
        dim: token dimension of the broadcast result.
        batch_dim: batch dimension of the broadcast result.
        rank: number of dimensions of the broadcast result.

    Returns:
        ``rank`` dimensions, with T at ``dim`` and 1 at ``batch_dim``.
    """
    if state.index is None:
        return side
    full = side[(None,) * (rank - side.dim())]
    moved = full.movedim((batch_dim, dim), (0, 1))
    if moved.size(1) == 1:
        return sample_rows(side, state, dim, batch_dim, rank)
    position = row_positions(state, side.device)
    rows = moved[0].index_select(0, position) if moved.size(0) == 1 else moved[samples_of(state, side.device), position]
    return rows.unsqueeze(0).movedim((0, 1), (batch_dim, dim))


def sample_rows(side: Tensor, state: TokenState, dim: int, batch_dim: int, rank: int) -> Tensor:
    """Read what belongs to a sample, such as a conditioning vector, once for each of its rows.

    Args:
        side: tensor that broadcasts to ``rank`` dimensions, with B (or 1) at ``batch_dim`` and 1 at ``dim``.
        state: as in :func:`side_input_rows`, and so are ``dim``, ``batch_dim`` and ``rank``.

    Returns:
        ``rank`` dimensions, with T at ``dim`` and 1 at ``batch_dim``; ``side`` itself if it is the same for all samples.
    """
    if state.index is None:
        return side
    full = side[(None,) * (rank - side.dim())]
    if full.size(batch_dim) == 1:
        return side
    return full.index_select(batch_dim, samples_of(state, side.device)).transpose(batch_dim, dim)


def split_rows(
    rows: Tensor, state: TokenState, sizes: int | Sequence[int], dim: int, batch_dim: int
) -> Sequence[Tensor]:
    """Return the rows of ``sizes`` samples each, or of as many as each of ``sizes`` says."""
    if state.index is None:
        return torch.split(rows, sizes if isinstance(sizes, int) else list(sizes), batch_dim)
    if isinstance(sizes, int):
        sizes = equal_parts(state.batch, sizes)
    counts, start = [], 0
    for size in sizes:
        counts.append(rows_before(state, start + size) - rows_before(state, start))
        start += size
    return torch.split(rows, counts, dim)


def equal_parts(total: int, size: int) -> list[int]:
    """Return the sizes of the parts of ``size`` that a total is cut into; the last may be smaller. It may be symbolic."""
    sizes, left = [], total
    while left > 0:
        sizes.append(min(size, left))
        left -= size
    return sizes


def chunk_rows(rows: Tensor, state: TokenState, chunks: int, dim: int, batch_dim: int) -> Sequence[Tensor]:
    """Return the rows of each of ``chunks`` parts of the batch."""
    return split_rows(rows, state, -(-state.batch // chunks), dim, batch_dim)


def slice_rows(rows: Tensor, state: TokenState, start: int | None, end: int | None, dim: int, batch_dim: int) -> Tensor:
    """Return the rows of the samples ``start`` to ``end``."""
    first, last = samples_between(state, start, end)
    if state.index is None:
        return rows.narrow(batch_dim, first, max(0, last - first))
    start = rows_before(state, first)
    return rows.narrow(dim, start, rows_before(state, last) - start)


def batch_entries(state: TokenState) -> int:
    """Return the size of the batch dimension of packed values: 1, or B while nothing was pruned."""
    return state.batch if state.index is None else 1


def row_entries(state: TokenState) -> int:
    """Return the size of the token dimension of packed values: T, or N while nothing was pruned."""
    return state.length if state.index is None else total_rows(state)


def total_rows(state: TokenState) -> int:
    """Return T, the number of rows of all samples."""
    return rows_before(state, state.batch)


def rows_before(state: TokenState, sample: int) -> int:
    """Return the number of rows of the samples before one."""
    return sample * state.length if state.rows is None else sum(state.rows.lengths[:sample])


def batch_size(state: TokenState) -> int:
    """Return B, the number of samples."""
    return state.batch


def read_position_of_rows(rows: Tensor, state: TokenState, dim: int, batch_dim: int, position: int) -> Tensor:
    """Return the token at the original ``position`` of each sample; as :func:`madtp.tokens.state.read_position`."""
    if state.index is None:
        return rows.select(dim, position)
    if position < 0:
        position += state.full_length
    return read_each_of_rows(rows, state, dim, batch_dim, torch.full((state.batch,), position, device=rows.device))


def read_each_of_rows(rows: Tensor, state: TokenState, dim: int, batch_dim: int, positions: Tensor) -> Tensor:
    """Return the token at the original ``positions [B]`` of each sample; as :func:`madtp.tokens.state.read_each`."""
    if state.index is None:
        return read_each(rows, state, dim, batch_dim, positions)
    slots = slots_of(state, positions)
    if state.rows is None:
        first = torch.arange(state.batch, device=rows.device) * state.length
    else:
        first = torch.arange(state.batch, device=rows.device) * state.length - state.rows.skipped
    return rows.index_select(dim, first + slots).transpose(batch_dim, dim).squeeze(dim)


def restore_rows(
    rows: Tensor, state: TokenState, dim: int, batch_dim: int, earlier: Sequence[tuple[Tensor, TokenState | None]]
) -> Tensor:
    """Scatter surviving tokens back to their original positions; as :func:`madtp.tokens.state.restore`.

    Args:
        rows: packed rows along ``state``.
        state: the state of the tokens.
        dim: token dimension.
        batch_dim: batch dimension.
        earlier: the stream's values just before each site so far, in order: all tokens, with None as their state, or packed
            rows with their state.

    Returns:
        The padded form with N0 tokens at ``dim``.
    """
    if state.index is None:
        return rows
    full = earlier[0][0].movedim((batch_dim, dim), (0, 1))
    for past, past_state in (*earlier[1:], (rows, state)):
        moved = past.movedim((batch_dim, dim), (0, 1))
        if past_state is None or past_state.index is None:
            full = moved
            continue
        own = moved.squeeze(0)
        assert past_state.merged is not None
        merged = in_rows(past_state.merged, past_state)
        # Padding takes up rows only where no slot is ever left out.
        real = ~merged if past_state.valid is None else ~merged & in_rows(past_state.valid, past_state)
        if past_state.static:
            full = written_back(full, in_slots(own, past_state), past_state, in_slots(real, past_state))
            continue
        kept = real.nonzero().squeeze(1)
        place = (samples_of(past_state, own.device) * full.size(1) + row_positions(past_state, own.device))[kept]
        scattered = full.flatten(0, 1).index_copy(0, place, own.index_select(0, kept).to(full.dtype))
        full = scattered.unflatten(0, full.shape[:2])
    return full.movedim((0, 1), (batch_dim, dim))
