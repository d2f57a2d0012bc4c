"""Marks of dropped tokens in a key/value cache: their slots hold NaN.

Start at :func:`mark_dropped`. A pruned call hands keys and values on at their full length: those of survivors at their original
positions, and NaN at all others. So it stays known which tokens were dropped, whatever a host does with the cache between
calls (reorder beams, crop, copy), and code that knows nothing of pruning cannot attend to them unnoticed. The next call hides
marked slots from attention.

Axis legend: B samples, N slots now, N0 original tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from madtp.tokens.state import TokenState, unpruned_state, written_back


@dataclass(frozen=True)
class MarkedAxes:
    """Where a tensor of a cache runs along pruned tokens.

    Attributes:
        batch_dim: its batch dimension.
        token_dim: its token dimension.
        tokens: which tokens these are; tensors with the same value have the same slots marked.
    """

    batch_dim: int
    token_dim: int
    tokens: str


def mark_dropped(values: Tensor, state: TokenState, dim: int, batch_dim: int) -> Tensor:
    """Return ``values`` along ``state`` with N0 slots at ``dim``: each at its original position, NaN at all others."""
    if state.index is None:
        return values
    moved = values.movedim((batch_dim, dim), (0, 1))
    full = moved.new_full((state.batch, state.full_length, *moved.shape[2:]), float("nan"))
    real = torch.ones_like(state.index, dtype=torch.bool) if state.valid is None else state.valid
    return written_back(full, moved, state, real).movedim((0, 1), (batch_dim, dim))


def zero_marked(values: Tensor) -> Tensor:
    """Return ``values`` with zeros in marked slots: attention gives them no weight, but zero times NaN would be NaN."""
    return values.masked_fill(values.isnan(), 0)


def unmarked(values: Tensor, dim: int, batch_dim: int) -> Tensor:
    """Return which slots of ``values`` are not marked, ``[B, N]``."""
    moved = values.movedim((batch_dim, dim), (0, 1))
    return moved.flatten(2)[:, :, 0].isnan().logical_not() if moved.dim() > 2 else moved.isnan().logical_not()


def cache_state(values: Tensor, dim: int, batch_dim: int) -> TokenState:
    """Return the state of a tensor of a cache: every token has its own slot, and marked slots are padding."""
    visible = unmarked(values, dim, batch_dim)
    batch, length = visible.shape
    if bool(visible.all()):
        return unpruned_state(batch, length)
    index = torch.arange(length, device=visible.device).expand(batch, length)
    return TokenState(
        full_length=length, length=length, batch=batch, index=index, valid=visible, merged=torch.zeros_like(visible)
    )


def any_marked(cached: Iterable[tuple[Tensor, MarkedAxes]]) -> bool:
    """Return whether any of these tensors has a marked slot."""
    clear = [unmarked(values, axes.token_dim, axes.batch_dim).all() for values, axes in cached]
    return bool(clear) and not bool(torch.stack(clear).all())
