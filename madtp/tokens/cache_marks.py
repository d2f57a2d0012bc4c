"""Marks of dropped tokens in what later calls read again (a key/value cache): their slots hold no numbers.

Start at :func:`placed`. A pruned call hands keys and values on at their full length, those of survivors in their places
and NaN in all others. So whatever a host does with them in between (reorders beams, cuts, copies), it stays known which
slots are dead, and code that does not know of pruning cannot attend to them unnoticed. A call that reads them again hides
these slots from attention.

Axis legend: B samples, N slots now, N0 original tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from madtp.tokens.state import TokenState, untouched


@dataclass(frozen=True)
class MarkedAxes:
    """Where a kept tensor runs along pruned tokens. tokens: which; tensors that agree have the same slots dead."""

    batch_dim: int
    token_dim: int
    tokens: str


def placed(values: Tensor, state: TokenState, dim: int, batch_dim: int) -> Tensor:
    """``values`` along ``state`` with N0 slots at ``dim``: each at the position that it stands for, NaN at all others."""
    if state.index is None:
        return values
    moved = values.movedim((batch_dim, dim), (0, 1))
    full = moved.new_full((state.batch, state.full_length, *moved.shape[2:]), float("nan"))
    real = torch.ones_like(state.index, dtype=torch.bool) if state.valid is None else state.valid
    rows, slots = real.nonzero(as_tuple=True)
    full = full.index_put((rows, state.index[rows, slots]), moved[rows, slots])
    return full.movedim((0, 1), (batch_dim, dim))


def cleaned(values: Tensor) -> Tensor:
    """Zeros in dead slots: attention gives them no weight, and no weight times NaN would be NaN."""
    return values.masked_fill(values.isnan(), 0)


def alive(values: Tensor, dim: int, batch_dim: int) -> Tensor:
    """``[B, N]`` which slots of ``values`` are no dead ones."""
    moved = values.movedim((batch_dim, dim), (0, 1))
    return moved.flatten(2)[:, :, 0].isnan().logical_not() if moved.dim() > 2 else moved.isnan().logical_not()


def alive_state(values: Tensor, dim: int, batch_dim: int) -> TokenState:
    """The state in which every token has its own slot and the dead ones are padding."""
    visible = alive(values, dim, batch_dim)
    batch, length = visible.shape
    if bool(visible.all()):
        return untouched(batch, length)
    index = torch.arange(length, device=visible.device).expand(batch, length)
    return TokenState(index, visible, torch.zeros_like(visible), None, length, length, batch)


def any_dead(kept: Iterable[tuple[Tensor, MarkedAxes]]) -> bool:
    """Whether any of these tensors has a dead slot."""
    found = [alive(values, axes.token_dim, axes.batch_dim).all() for values, axes in kept]
    return bool(found) and not bool(torch.stack(found).all())
