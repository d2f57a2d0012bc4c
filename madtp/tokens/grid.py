"""What is known of each token, carried to where the token stands in a grid: windows, shifts, padding, channels first.

A pruned stream may need its grid inside a block: all tokens are put back to their places
(:func:`madtp.tokens.state.restore`), the block runs on the whole grid, and its result is read at the kept positions.
Attention in there must not see dropped tokens. The functions here carry which tokens are alive along the way that keys
go; with nothing pruned there is nothing to carry, and each of them hands ``None`` on.

Axis legend: B samples, N0 tokens of the whole grid, B' windows of all samples, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from madtp.tokens.attention import HIDDEN, join_masks
from madtp.tokens.state import TokenState, kept_positions


def alive(state: TokenState, shape: Sequence[int], batch_dim: int, token_dim: int) -> Tensor | None:
    """Which original tokens the stream still holds: bool, B at ``batch_dim``, N0 at ``token_dim``, 1 at the other of the
    dimensions that ``shape`` counts; None where nothing was pruned."""
    if state.index is None:
        return None
    kept = kept_positions(state)
    if batch_dim > token_dim:
        kept = kept.t()
    sizes = [1] * len(shape)
    sizes[min(batch_dim, token_dim)], sizes[max(batch_dim, token_dim)] = kept.shape
    return kept.reshape(sizes)


def regroup(carried: Tensor | None, like: Tensor, beside: Sequence[int]) -> Tensor | None:
    """``carried`` in the shape of ``like`` without the sizes ``beside``, along which it does not change."""
    if carried is None:
        return None
    return carried.reshape([size // plain for size, plain in zip(like.shape, beside, strict=True)])


def reorder(carried: Tensor | None, dims: Sequence[int]) -> Tensor | None:
    """``carried`` with its dimensions in a new order."""
    return None if carried is None else carried.permute(*dims)


def take(carried: Tensor | None, operation: Callable[..., Tensor], arguments: Sequence[Any]) -> Tensor | None:
    """``carried`` through an operation that takes entries from elsewhere; what comes new is alive."""
    if carried is None:
        return None
    if "pad" in str(operation):
        return torch.nn.functional.pad(carried, list(arguments[0]), value=1)
    return operation(carried, *arguments)


def hide(mask: Tensor | None, visible: Tensor | None) -> Tensor | None:
    """An attention mask that hides the keys of dropped tokens as well.

    Args:
        mask: broadcastable to ``[B', H, Q, K]``, or None.
        visible: ``[B', 1, K, 1]`` bool, or None where all are alive. A query that would see no key (one of a dropped token,
            in a window of dropped tokens) sees what it saw before, so that no row is empty.
    """
    if visible is None:
        return mask
    shown = visible.transpose(-1, -2)
    if mask is None:
        return shown | ~shown.any(-1, keepdim=True)
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    return join_masks(mask, shown | ~(seen & shown).any(-1, keepdim=True))
