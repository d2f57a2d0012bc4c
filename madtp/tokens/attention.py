"""The one attention node of a rewritten graph, and the statistics that pruning reads off it.

:func:`attention` stands for every spelling of attention that the rewriter recognises.
:func:`attention_with_statistics` also yields what DTP needs (docs/method.md, importance): it walks over blocks of
samples and queries, so the attention map of all heads never exists as a whole.

Axis legend: B samples, H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.method.importance import AttentionStatistics
from madtp.tokens.state import TokenState, gather_positions

# An additive mask below this value hides a key: models use -10000 or the smallest number of the dtype.
HIDDEN = -1000.0
QUERY_BLOCK = 128
# Probabilities a block on a CPU: so many stay in its cache, and large tensors are slow to come by.
CPU_BLOCK = 2**19


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    grouped: bool = False,
    softcap: float | None = None,
    present_mask: Tensor | None = None,
    query_state: TokenState | None = None,
    key_state: TokenState | None = None,
) -> Tensor:
    """Scaled dot-product attention over surviving tokens.

    Args:
        query, key, value: ``[B, H, Q, D]``, ``[B, H, K, D]``, ``[B, H, K, Dv]``; with ``grouped`` keys may have fewer
        heads.
        mask: boolean (True = may attend) or additive, broadcastable to ``[B, H, Q0, K0]`` over the *original* tokens.
        softcap: scores s become ``softcap * tanh(s / softcap)`` in front of the mask.
        present_mask: the like over the tokens that are there, in place of ``mask``: a bias that is computed from them.
        query_state, key_state: states of the pruned streams, None where a stream is not pruned.
    Returns:
        ``[B, H, Q, Dv]``.
    """
    mask, causal = mask_of_survivors(query, key, mask, causal, present_mask, query_state, key_state)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        key, value = (_each_head(operand, query.size(1)) for operand in (key, value))
    outputs = []
    blind = _blind(mask, causal, query.size(2), key.size(2))
    for _, _, probabilities in _by_blocks(query, key, mask, blind, causal, scale, softcap):
        outputs.append(F.dropout(probabilities.to(value.dtype), dropout_p, dropout_p > 0) @ value)
    return _joined(outputs, 2)


def mask_of_survivors(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    present: Tensor | None,
    query_state: TokenState | None,
    key_state: TokenState | None,
) -> tuple[Tensor | None, bool]:
    """The mask over surviving tokens: rows and columns gathered, padding slots hidden.

    present: a mask over them, in place of ``mask``.
    """
    rows = None if query_state is None else mask_positions(query_state)
    columns = None if key_state is None else mask_positions(key_state)
    if rows is None and columns is None:
        return mask if present is None else present, causal
    if key_state is not None and key_state is not query_state and key_state.quirks.ignores_cross_masks:
        mask = None
    if causal:
        row = torch.arange(query.size(2), device=query.device)[None] if rows is None else rows
        column = torch.arange(key.size(2), device=key.device)[None] if columns is None else columns
        order = (row[:, None, :, None] >= column[:, None, None, :]).expand(query.size(0), 1, -1, -1)
        mask = order if mask is None else join_masks(_aligned(mask, query_state, key_state), order)
    else:
        mask = present if mask is None else _aligned(mask, query_state, key_state)
    if key_state is not None and key_state.valid is not None:
        valid = key_state.valid[:, None, None, :]
        mask = valid if mask is None else join_masks(mask, valid)
    return mask, False


def _aligned(mask: Tensor, query_state: TokenState | None, key_state: TokenState | None) -> Tensor:
    for state, dim in ((query_state, 2), (key_state, 3)):
        index = None if state is None else mask_positions(state)
        if index is not None:
            mask = gather_positions(mask, index, dim, 0, 4)
    return mask


def mask_positions(state: TokenState) -> Tensor | None:
    """``[B, N]`` where masks over the original tokens are read; None where nothing was pruned."""
    return state.index if state.mask_index is None else state.mask_index


def join_masks(mask: Tensor, visible: Tensor) -> Tensor:
    """``mask`` with everything hidden that ``visible`` (boolean) does not show."""
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def valid_keys(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """``[B, K]``: which keys some query of some head may see, or None if all; this is how padding is told."""
    if mask is None or mask.size(-1) == 1:
        return None
    full = mask[(None,) * (4 - mask.dim())]
    seen = full.any(dim=(1, 2)) if mask.dtype == torch.bool else full.amax(dim=(1, 2)) > HIDDEN
    return seen.expand(batch, length)


def attention_with_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    causal: bool,
    *,
    scale: float | None,
    grouped: bool,
    softcap: float | None,
    rows: Tensor | None,
    class_slot: Tensor | None,
) -> tuple[Tensor, AttentionStatistics]:
    """Attention together with the statistics of DTP.

    Args:
        mask: over the present tokens (see :func:`mask_of_survivors`). softcap: as in :func:`attention`.
        rows: ``[B, Q]`` queries that count in the column sums; None = all.
        class_slot: ``[B]`` slot whose row is the class attention; None if the stream has no such token.
    Returns:
        output ``[B, H, Q, Dv]`` and :class:`~madtp.method.importance.AttentionStatistics`.
    """
    if grouped:
        key, value = (_each_head(operand, query.size(1)) for operand in (key, value))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    batch, heads, queries, _ = query.shape
    blind = _blind(mask, causal, queries, key.size(2))
    # Elsewhere the question would make the host wait for the device.
    if blind is not None and blind.device.type == "cpu" and not bool(blind.any()):
        blind = None
    block = _block(query, heads * key.size(2))
    samples = max(1, block // queries)
    operands = (query, key, value, mask, blind, rows, class_slot)
    found = []
    for part in zip(*(_some_samples(operand, batch, samples) for operand in operands), strict=True):
        own_query, own_key, own_value, own_mask, own_blind, own_rows, own_slot = part
        blocks = _by_blocks(own_query, own_key, own_mask, own_blind, causal, scale, softcap, min(block, queries))
        found.append(_collected(blocks, own_value, dropout_p, own_rows, own_slot))
    output, received, class_rows = (_joined([part[i] for part in found], 0) for i in range(3))
    norms = output.float().norm(dim=-1)
    return output, AttentionStatistics(received, None if class_slot is None else class_rows, norms)


def _block(query: Tensor, probabilities: int) -> int:
    """Rows a block, over samples and queries; each is the ``probabilities`` of a query in all heads."""
    if query.device.type == "cpu":
        return max(1, CPU_BLOCK // probabilities)
    return query.size(0) * QUERY_BLOCK


def _some_samples(part: Any, batch: int, samples: int) -> Sequence[Any]:
    """What belongs to each ``samples`` samples of a batch; the same for all where it is None or of no sample."""
    if part is None or part.size(0) != batch:
        return [part] * max(1, -(-batch // samples))
    return part.split(samples)


def _collected(
    blocks: Iterator[tuple[int, int, Tensor]],
    value: Tensor,
    dropout_p: float,
    rows: Tensor | None,
    class_slot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, H, Q, Dv]``, received ``[B, K]`` and class row ``[B, H, K]`` (meaningless without ``class_slot``)."""
    batch, heads, keys, _ = value.shape
    outputs: list[Tensor] = []
    received = value.new_zeros(batch, keys, dtype=torch.float32)
    class_row = value.new_zeros(batch, heads, keys, dtype=torch.float32)
    for start, stop, probabilities in blocks:
        strongest = probabilities.amax(1)
        if rows is not None:
            strongest = strongest * rows[:, start:stop, None]
        received = received + strongest.sum(1)
        if class_slot is not None:
            local = class_slot - start
            inside = (local >= 0) & (local < stop - start)
            picked = probabilities[torch.arange(batch, device=value.device), :, local.clamp(0, stop - start - 1)]
            class_row = class_row + picked * inside[:, None, None]
        outputs.append(F.dropout(probabilities.to(value.dtype), dropout_p, dropout_p > 0) @ value)
    return _joined(outputs, 2), received, class_row


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _each_head(operand: Tensor, heads: int) -> Tensor:
    """Keys or values with one head for each of the queries'."""
    return operand if operand.size(1) == heads else operand.repeat_interleave(heads // operand.size(1), 1)


def _blind(mask: Tensor | None, causal: bool, queries: int, keys: int) -> Tensor | None:
    """``[..., Q, 1]``, or 1 in place of Q: which queries see no key at all (padding on the left); None: none by its form."""
    if mask is None:
        return None
    hidden = ~mask if mask.dtype == torch.bool else mask == float("-inf")
    if causal:
        hidden = hidden | _later(0, queries, keys, mask.device)
    return hidden.all(-1, keepdim=True)


def _later(start: int, stop: int, keys: int, device: torch.device) -> Tensor:
    """``[Q, K]`` which keys come after each query from ``start`` to ``stop``."""
    return torch.arange(start, stop, device=device)[:, None] < torch.arange(keys, device=device)[None]


def _by_blocks(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    blind: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    block: int = QUERY_BLOCK,
) -> Iterator[tuple[int, int, Tensor]]:
    """First and last query of each block, and its probabilities ``[B, H, Q', K]``, in float32 at least; zeros for a query
    that is ``blind``, as torch's own attention has it."""
    factor = query.size(-1) ** -0.5 if scale is None else scale
    transposed = key.transpose(-1, -2)
    for start in range(0, query.size(2), block):
        stop = min(start + block, query.size(2))
        scores = (query[:, :, start:stop] * factor) @ transposed
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if causal:
            scores = scores.masked_fill_(_later(start, stop, key.size(2), scores.device), float("-inf"))
        if mask is not None:
            shown = _of_queries(mask, start, stop)
            scores = scores.masked_fill_(~shown, float("-inf")) if shown.dtype == torch.bool else scores + shown
        dtype = torch.promote_types(scores.dtype, torch.float32)
        if blind is None:
            yield start, stop, scores.softmax(-1, dtype=dtype)
        else:
            unseeing = _of_queries(blind, start, stop)
            yield start, stop, scores.masked_fill(unseeing, 0).softmax(-1, dtype=dtype).masked_fill(unseeing, 0)


def _of_queries(mask: Tensor, start: int, stop: int) -> Tensor:
    """What a mask over queries and keys has for some queries."""
    return mask if mask.dim() < 2 or mask.size(-2) == 1 else mask[..., start:stop, :]
