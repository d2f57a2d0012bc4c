"""Attention over the tokens that survive, and the statistics that pruning reads off it.

Start at :func:`attention`, the one attention node of a rewritten graph: it stands for every spelling of attention that the
rewriter recognises. :class:`AttentionInputs` holds what such a node is given. :func:`attention_with_statistics` also yields
what the importance needs (``docs/method.md``, "Importance"). It walks over blocks of samples and queries, so the attention map
of all heads never exists as a whole.

Axis legend: B samples, H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.method.importance import AttentionStatistics
from madtp.tokens.state import TokenState, gather_positions

if TYPE_CHECKING:
    from typing_extensions import Unpack

# An additive mask below this value hides a key: models use -10000 or the smallest number of the dtype.
HIDDEN = -1000.0
QUERY_BLOCK = 128
# Probabilities per block on a CPU: as many as stay in its cache.
CPU_BLOCK = 2**19

Operand = TypeVar("Operand", Tensor, Tensor | None)


class AttentionOptions(TypedDict, total=False):
    """Options of an attention that a graph passes by name.

    Attributes:
        scale: factor on the scores; None for ``D ** -0.5``.
        grouped: keys and values have fewer heads than queries, each serving several of them.
        softcap: scores s become ``softcap * tanh(s / softcap)`` before the mask is added; None for no cap.
    """

    scale: float | None
    grouped: bool
    softcap: float | None


@dataclass(frozen=True)
class AttentionInputs:
    """What an attention is given.

    Attributes:
        query: ``[B, H, Q, D]``.
        key: ``[B, H, K, D]``; fewer heads if ``grouped``.
        value: ``[B, H, K, Dv]``; fewer heads if ``grouped``.
        mask: boolean (True where a query sees a key) or additive, broadcastable to ``[B, H, Q, K]``.
        dropout_p: dropout probability of the attention weights.
        causal: a query sees only keys up to its own position.
        scale: as in :class:`AttentionOptions`, and so are ``grouped`` and ``softcap``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout_p: float
    causal: bool
    scale: float | None = None
    grouped: bool = False
    softcap: float | None = None

    def over_survivors(
        self, query_state: TokenState | None, key_state: TokenState | None, present_mask: Tensor | None
    ) -> AttentionInputs:
        """Return the inputs with a mask over the tokens that are present; see :func:`attention`."""
        mask, causal = mask_of_survivors(self, query_state, key_state, present_mask)
        return replace(self, mask=mask, causal=causal)

    def ungrouped(self) -> AttentionInputs:
        """Return the inputs with one head of keys and values for each head of the queries."""
        if not self.grouped:
            return self
        heads = self.query.size(1)
        return replace(self, key=_each_head(self.key, heads), value=_each_head(self.value, heads), grouped=False)


class _Block(NamedTuple):
    """Probabilities ``[B, H, stop - start, K]`` of the queries from ``start`` to ``stop``."""

    start: int
    stop: int
    probabilities: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    *,
    present_mask: Tensor | None = None,
    query_state: TokenState | None = None,
    key_state: TokenState | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """Scaled dot-product attention over surviving tokens.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, H, K, D]``.
        value: ``[B, H, K, Dv]``.
        mask: boolean (True where a query sees a key) or additive, broadcastable to ``[B, H, Q0, K0]``: over the *original*
            tokens.
        dropout_p: dropout probability of the attention weights.
        causal: a token sees only earlier ones.
        present_mask: a mask over the tokens that are present, in place of ``mask``: a bias that is computed from them.
        query_state: state of the stream of the queries; None if it is not pruned.
        key_state: state of the stream of the keys; None if it is not pruned.
        **options: see :class:`AttentionOptions`.

    Returns:
        ``[B, H, Q, Dv]``.
    """
    inputs = AttentionInputs(query, key, value, mask, dropout_p, causal, **options)
    return plain_attention(inputs.over_survivors(query_state, key_state, present_mask))


def plain_attention(inputs: AttentionInputs) -> Tensor:
    """Return the output ``[B, H, Q, Dv]`` of an attention, by torch's fused kernels where they can compute it."""
    if inputs.softcap is None:
        return F.scaled_dot_product_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.mask,
            inputs.dropout_p,
            inputs.causal,
            scale=inputs.scale,
            enable_gqa=inputs.grouped,
        )
    inputs = inputs.ungrouped()
    blocks = _blocks(inputs, _queries_without_keys(inputs), QUERY_BLOCK)
    return _joined([_weighted(block.probabilities, inputs.value, inputs.dropout_p) for block in blocks], 2)


def mask_of_survivors(
    inputs: AttentionInputs,
    query_state: TokenState | None,
    key_state: TokenState | None,
    present_mask: Tensor | None,
) -> tuple[Tensor | None, bool]:
    """Return the mask over surviving tokens, and whether the attention still has to be causal.

    The rows and columns of a mask over the original tokens are gathered, causality among survivors becomes part of the mask,
    and padding slots are hidden.

    Args:
        inputs: the inputs of the attention; their mask is over the original tokens.
        query_state: state of the stream of the queries; None if it is not pruned.
        key_state: state of the stream of the keys; None if it is not pruned.
        present_mask: a mask over the surviving tokens, in place of the one in ``inputs``.
    """
    query, key, mask = inputs.query, inputs.key, inputs.mask
    rows = None if query_state is None else mask_positions(query_state)
    columns = None if key_state is None else mask_positions(key_state)
    if rows is None and columns is None:
        return mask if present_mask is None else present_mask, inputs.causal
    if key_state is not None and key_state is not query_state and key_state.quirks.ignores_cross_masks:
        mask = None
    if inputs.causal:
        row = torch.arange(query.size(2), device=query.device)[None] if rows is None else rows
        column = torch.arange(key.size(2), device=key.device)[None] if columns is None else columns
        order = (row[:, None, :, None] >= column[:, None, None, :]).expand(query.size(0), 1, -1, -1)
        mask = order if mask is None else join_masks(_gathered_mask(mask, query_state, key_state), order)
    else:
        mask = present_mask if mask is None else _gathered_mask(mask, query_state, key_state)
    if key_state is not None and key_state.valid is not None:
        valid = key_state.valid[:, None, None, :]
        mask = valid if mask is None else join_masks(mask, valid)
    return mask, False


def _gathered_mask(mask: Tensor, query_state: TokenState | None, key_state: TokenState | None) -> Tensor:
    for state, dim in ((query_state, 2), (key_state, 3)):
        index = None if state is None else mask_positions(state)
        if index is not None:
            mask = gather_positions(mask, index, dim, 0, 4)
    return mask


def mask_positions(state: TokenState) -> Tensor | None:
    """Return where masks over the original tokens are read, ``[B, N]``; None if nothing was pruned."""
    return state.index if state.mask_index is None else state.mask_index


def join_masks(mask: Tensor, visible: Tensor) -> Tensor:
    """Return ``mask`` with everything hidden that is False in ``visible``."""
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def valid_keys(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return which keys some query of some head sees, ``[B, K]``, or None if all: the others are padding."""
    if mask is None or mask.size(-1) == 1:
        return None
    full = mask[(None,) * (4 - mask.dim())]
    seen = full.any(dim=(1, 2)) if mask.dtype == torch.bool else full.amax(dim=(1, 2)) > HIDDEN
    return seen.expand(batch, length)


def attention_with_statistics(
    inputs: AttentionInputs, *, counted: Tensor | None, class_slot: Tensor | None
) -> tuple[Tensor, AttentionStatistics]:
    """Return the output of an attention together with the statistics of DTP.

    Args:
        inputs: with a mask over the tokens that are present.
        counted: ``[B, Q]`` bool, the queries that count in the attention that a key receives. None for all.
        class_slot: ``[B]`` slot whose row is the class attention. None if the stream has no such token.

    Returns:
        output ``[B, H, Q, Dv]`` and its statistics.
    """
    inputs = inputs.ungrouped()
    if inputs.mask is not None:
        inputs = replace(inputs, mask=inputs.mask[(None,) * (4 - inputs.mask.dim())])
    batch, heads, queries, _ = inputs.query.shape
    empty = _queries_without_keys(inputs)
    # On other devices the question would make the host wait.
    if empty is not None and empty.device.type == "cpu" and not bool(empty.any()):
        empty = None
    block = _rows_per_block(inputs.query, heads * inputs.key.size(2))
    samples = max(1, block // queries)
    outputs, receiveds, class_rows = [], [], []
    for part, empty_part, counted_part, slot_part in zip(
        _split_inputs(inputs, samples),
        _split_samples(empty, batch, samples),
        _split_samples(counted, batch, samples),
        _split_samples(class_slot, batch, samples),
        strict=True,
    ):
        blocks = _blocks(part, empty_part, min(block, queries))
        output, received, class_row = _collect(blocks, part, counted_part, slot_part)
        outputs.append(output)
        receiveds.append(received)
        class_rows.append(class_row)
    output = _joined(outputs, 0)
    class_rows_of_all = None if class_slot is None else _joined(class_rows, 0)
    return output, AttentionStatistics(_joined(receiveds, 0), class_rows_of_all, output.float().norm(dim=-1))


def _rows_per_block(query: Tensor, probabilities: int) -> int:
    """Rows of a block, over samples and queries; a row is the ``probabilities`` of one query in all heads."""
    if query.device.type == "cpu":
        return max(1, CPU_BLOCK // probabilities)
    return query.size(0) * QUERY_BLOCK


def _split_inputs(inputs: AttentionInputs, samples: int) -> list[AttentionInputs]:
    """The inputs of every ``samples`` samples."""
    batch = inputs.query.size(0)
    operands = zip(
        _split_samples(inputs.query, batch, samples),
        _split_samples(inputs.key, batch, samples),
        _split_samples(inputs.value, batch, samples),
        _split_samples(inputs.mask, batch, samples),
        strict=True,
    )
    return [replace(inputs, query=q, key=k, value=v, mask=mask) for q, k, v, mask in operands]


def _split_samples(operand: Operand, batch: int, samples: int) -> Sequence[Operand]:
    """The part of an operand for every ``samples`` samples; the same for all where it has no entries per sample."""
    if operand is None or operand.size(0) != batch:
        return [operand] * max(1, -(-batch // samples))
    return torch.split(operand, samples)


def _collect(
    blocks: Iterator[_Block], inputs: AttentionInputs, counted: Tensor | None, class_slot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, H, Q, Dv]``, attention received ``[B, K]`` and class row ``[B, H, K]`` (zeros without ``class_slot``)."""
    value = inputs.value
    batch, heads, keys, _ = value.shape
    outputs: list[Tensor] = []
    received = value.new_zeros(batch, keys, dtype=torch.float32)
    class_row = value.new_zeros(batch, heads, keys, dtype=torch.float32)
    for start, stop, probabilities in blocks:
        strongest = probabilities.amax(1)
        if counted is not None:
            strongest = strongest * counted[:, start:stop, None]
        received = received + strongest.sum(1)
        if class_slot is not None:
            local = class_slot - start
            inside = (local >= 0) & (local < stop - start)
            picked = probabilities[torch.arange(batch, device=value.device), :, local.clamp(0, stop - start - 1)]
            class_row = class_row + picked * inside[:, None, None]
        outputs.append(_weighted(probabilities, value, inputs.dropout_p))
    return _joined(outputs, 2), received, class_row


def _weighted(probabilities: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    return F.dropout(probabilities.to(value.dtype), dropout_p, dropout_p > 0) @ value


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _each_head(operand: Tensor, heads: int) -> Tensor:
    """Keys or values with one head for each of the queries'."""
    return operand if operand.size(1) == heads else operand.repeat_interleave(heads // operand.size(1), 1)


def _queries_without_keys(inputs: AttentionInputs) -> Tensor | None:
    """Which queries see no key at all, such as padding on the left: ``[..., Q, 1]``, or 1 in place of Q.

    None without a mask, as then every query sees a key.
    """
    mask = inputs.mask
    if mask is None:
        return None
    hidden = ~mask if mask.dtype == torch.bool else mask == float("-inf")
    if inputs.causal:
        hidden = hidden | _later_keys(0, inputs.query.size(2), inputs.key.size(2), mask.device)
    return hidden.all(-1, keepdim=True)


def _later_keys(start: int, stop: int, keys: int, device: torch.device) -> Tensor:
    """``[Q, K]``, which keys come after each query from ``start`` to ``stop``."""
    return torch.arange(start, stop, device=device)[:, None] < torch.arange(keys, device=device)[None]


def _blocks(inputs: AttentionInputs, empty: Tensor | None, size: int) -> Iterator[_Block]:
    """Probabilities of ``size`` queries at a time, in float32 at least.

    They are zeros for ``empty`` queries, which see no key, as in torch's own attention.
    """
    query, key, mask, softcap = inputs.query, inputs.key, inputs.mask, inputs.softcap
    factor = query.size(-1) ** -0.5 if inputs.scale is None else inputs.scale
    transposed = key.transpose(-1, -2)
    for start in range(0, query.size(2), size):
        stop = min(start + size, query.size(2))
        scores = (query[:, :, start:stop] * factor) @ transposed
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if inputs.causal:
            scores = scores.masked_fill_(_later_keys(start, stop, key.size(2), scores.device), float("-inf"))
        if mask is not None:
            shown = _rows(mask, start, stop)
            scores = scores.masked_fill_(~shown, float("-inf")) if shown.dtype == torch.bool else scores + shown
        dtype = torch.promote_types(scores.dtype, torch.float32)
        if empty is None:
            yield _Block(start, stop, scores.softmax(-1, dtype=dtype))
        else:
            zeros = _rows(empty, start, stop)
            yield _Block(start, stop, scores.masked_fill(zeros, 0).softmax(-1, dtype=dtype).masked_fill(zeros, 0))


def _rows(mask: Tensor, start: int, stop: int) -> Tensor:
    """The rows of a mask for the queries from ``start`` to ``stop``."""
    return mask if mask.dim() < 2 or mask.size(-2) == 1 else mask[..., start:stop, :]
