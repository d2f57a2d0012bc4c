"""Key/value caches from which tokens were dropped, as programs return and take them.

Start at :func:`without_dropped`. A pruned call hands on the keys and values of survivors alone
(:class:`~madtp.tokens.cached_tokens.CachedTokens`), and calls that go on from them run the host's own code
(``madtp/programs/cached_steps.py``). Where that cannot be followed, a program takes tensors of all tokens in which dropped
ones are marked, by NaN, and hides marked slots from attention.

Axis legend: B samples, N slots now, N0 original tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from madtp.tokens.cached_slots import CachedSlots, Origin, slots_of_state
from madtp.tokens.cached_tokens import CachedTokens
from madtp.tokens.state import TokenState, gather_positions, marked_first, unpruned_state


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


def without_dropped(values: Tensor, state: TokenState, dim: int, batch_dim: int) -> Tensor:
    """Return ``values`` along ``state`` as a cache keeps them: to the host a tensor of all N0 tokens along ``dim``."""
    return values if state.index is None else CachedTokens(values, slots_of_state(state, values.device), dim, batch_dim)


def without_marked(values: Tensor, axes: MarkedAxes) -> Tensor:
    """Return ``values`` with NaN for dropped tokens as :func:`without_dropped` does."""
    visible = unmarked(values, axes.token_dim, axes.batch_dim)
    if bool(visible.all()):
        return values
    counts = visible.sum(1)
    index = marked_first(visible)[:, : int(counts.max())]
    valid = torch.arange(index.size(1), device=index.device) < counts[:, None]
    survivors = gather_positions(values, index, axes.token_dim, axes.batch_dim, values.dim())
    slots = CachedSlots(
        visible.size(1), index.masked_fill(~valid, 0), index.size(1), None if bool(valid.all()) else valid, Origin(None)
    )
    return CachedTokens(zero_marked(survivors), slots, axes.token_dim, axes.batch_dim)


def with_marks(leaves: Iterable[object]) -> list[object]:
    """Return leaves of a call, with a tensor of all tokens in place of each that holds survivors alone."""
    return [one.marked() if isinstance(one, CachedTokens) else one for one in leaves]


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
