"""Windows of tokens: attention in which a token sees the tokens of its own window only.

Start at :data:`Windows`. While all tokens are there, windows of one length run as samples of one batch (:func:`in_windows`).
Packed rows of survivors are sorted by their windows, each of which is a sample then (:func:`window_rows`). A mask says the same
elsewhere.

Axis legend: B samples, N slots of a sample, T rows of all samples, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from madtp.tokens.packed_rows import packed_rows
from madtp.tokens.packing import in_slots, row_positions, samples_of
from madtp.tokens.state import TokenState

Windows: TypeAlias = tuple[int, ...]
"""How many of the original tokens belong to each window, one window after the other."""


def window_of_each(windows: Windows, device: torch.device) -> Tensor:
    """Return the window of each original token, ``[N0]``."""
    numbers = [number for number, length in enumerate(windows) for _ in range(length)]
    return torch.tensor(numbers, device=device)


def numbers_by_length(windows: Windows) -> list[list[int]]:
    """Return the numbers of the windows of each length."""
    found: dict[int, list[int]] = {}
    for number, length in enumerate(windows):
        found.setdefault(length, []).append(number)
    return list(found.values())


def in_windows(values: Tensor, windows: Windows, numbers: Sequence[int], dim: int) -> Tensor:
    """Return the windows ``numbers`` of ``values``, which has all tokens at ``dim``, as samples of one batch."""
    parts = values.split(list(windows), dim)
    return torch.cat([parts[number] for number in numbers])


def from_windows(results: Sequence[tuple[list[int], Tensor]], dim: int) -> Tensor:
    """Return all tokens at ``dim`` again, from the numbers of windows and what :func:`in_windows` gives for them."""
    parts: dict[int, Tensor] = {}
    for numbers, result in results:
        parts.update(zip(numbers, result.unflatten(0, (len(numbers), -1)).unbind(0), strict=True))
    return torch.cat([parts[number] for number in sorted(parts)], dim)


@dataclass(frozen=True)
class WindowRows:
    """The rows of survivors, sorted by their windows.

    Attributes:
        state: their state, in which each window that kept a token is a sample.
        order: ``[T]``, the row of the samples that each of them is.
    """

    state: TokenState
    order: Tensor

    def back(self, values: Tensor, dim: int) -> Tensor:
        """Return values of the sorted rows in the order of the samples."""
        return values.index_select(dim, self.order.argsort())


def sorts_by_window(state: TokenState) -> bool:
    """Whether rows can be sorted: the number of tokens in a window must not be fixed, nor padding take up rows."""
    return not state.static and (state.rows is not None or state.valid is None)


def window_rows(state: TokenState, windows: Windows, device: torch.device) -> WindowRows:
    """Sort the rows of a state by their windows. A merged token belongs to the window of the token that it stands for."""
    positions = row_positions(state, device)
    window = samples_of(state, device) * len(windows) + window_of_each(windows, device)[positions]
    order = window.argsort(stable=True)
    lengths = [length for length in window.bincount().tolist() if length]
    rows = packed_rows(lengths, max(lengths), device)
    own = TokenState(full_length=state.full_length, length=max(lengths), batch=len(lengths), rows=rows)
    valid = None if rows is None else in_slots(torch.ones_like(order, dtype=torch.bool), own)
    index = in_slots(positions[order], own)
    return WindowRows(
        TokenState(
            full_length=state.full_length, length=own.length, batch=own.batch, index=index, valid=valid, rows=rows
        ),
        order,
    )
