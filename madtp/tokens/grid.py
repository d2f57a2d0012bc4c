"""A value for each token of a grid, carried along through windows, shifts, padding and transpositions.

A block may need the grid of a pruned stream. All tokens are then restored (:func:`madtp.tokens.state.restore`), the block runs
on the whole grid, and its result is read at the positions of the survivors. Attention inside the block must not see dropped
tokens, so a mask of the survivors (:func:`survivors_on_grid`) takes the same way as the keys; the attention that each token
receives takes the way back. While nothing was pruned the mask is ``None``, and every function here passes ``None`` on.

Axis legend: B samples, N0 tokens of the whole grid, B' windows of all samples, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from madtp.tokens.attention import HIDDEN, join_masks
from madtp.tokens.state import TokenState, kept_positions

PADS = (torch.ops.aten.pad, torch.ops.aten.constant_pad_nd)


def survivors_on_grid(state: TokenState, shape: Sequence[int], batch_dim: int, token_dim: int) -> Tensor | None:
    """Return which original tokens survive, in the layout of a tensor of all tokens.

    Args:
        state: the state of the stream.
        shape: the shape of the tensor; only the number of its dimensions counts.
        batch_dim: where the mask has B.
        token_dim: where the mask has N0.

    Returns:
        A boolean mask of size 1 in all other dimensions; None if nothing was pruned.
    """
    if state.index is None:
        return None
    kept = kept_positions(state)
    if batch_dim > token_dim:
        kept = kept.t()
    sizes = [1] * len(shape)
    sizes[min(batch_dim, token_dim)], sizes[max(batch_dim, token_dim)] = kept.shape
    return kept.reshape(sizes)


def regroup(values: Tensor | None, like: Tensor, constant: Sequence[int]) -> Tensor | None:
    """Return ``values`` in the shape of ``like`` divided by the sizes ``constant``, along which they do not change."""
    if values is None:
        return None
    return values.reshape([size // factor for size, factor in zip(like.shape, constant, strict=True)])


def reorder(values: Tensor | None, dims: Sequence[int]) -> Tensor | None:
    """Return ``values`` with their dimensions permuted."""
    return None if values is None else values.permute(*dims)


def take(values: Tensor | None, operation: Callable[..., Tensor], arguments: Sequence[Any]) -> Tensor | None:
    """Return ``values`` after an operation that moves entries (roll, flip, index, pad); what padding adds is 1, a survivor."""
    if values is None:
        return None
    if getattr(operation, "overloadpacket", None) in PADS:
        return torch.nn.functional.pad(values, list(arguments[0]), value=1)
    return operation(values, *arguments)


def hide(mask: Tensor | None, visible: Tensor | None) -> Tensor | None:
    """Return an attention mask that also hides the keys of dropped tokens.

    A query that would see no key, in a window of dropped tokens, sees what it saw before, so that no row is empty.

    Args:
        mask: broadcastable to ``[B', H, Q, K]``, or None.
        visible: ``[B', 1, K, 1]`` bool, False at dropped tokens. None if there are none.
    """
    if visible is None:
        return mask
    shown = visible.transpose(-1, -2)
    if mask is None:
        return shown | ~shown.any(-1, keepdim=True)
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    return join_masks(mask, shown | ~(seen & shown).any(-1, keepdim=True))
