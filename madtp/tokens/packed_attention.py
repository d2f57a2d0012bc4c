"""Attention over packed rows: a sample's rows attend to the rows of the same sample.

Start at :func:`packed_attention`, the attention node of a packed stream, and :func:`packed_attention_with_statistics`, its
form in front of a site. Samples with the same number of rows share one call of torch's attention. Otherwise, on a CPU, each
has a call of its own, so nothing is computed for padding and no mask keeps a fused kernel away. ``device_attention.py`` is for
GPUs.

Axis legend: B samples, H heads, Q and K queries and keys of a sample, T rows of all samples, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.calls.compiling import is_compiling
from madtp.method.importance import AttentionStatistics
from madtp.tokens.attention import (
    AttentionInputs,
    AttentionOptions,
    hides_nothing,
    join_masks,
    joined,
    plain_attention,
)
from madtp.tokens.device_attention import attend_on_device, observe_on_device
from madtp.tokens.packing import in_rows, in_slots, lengths_of, row_positions, side_input_rows
from madtp.tokens.sampled_scores import attention_with_sampled_statistics, counted_within_windows, observe_sample
from madtp.tokens.scored_attention import (
    WHOLE_MAP,
    Asked,
    Counted,
    Scratch,
    is_plain,
    observe_heads,
    seen_by,
    shares_memory,
)
from madtp.tokens.state import TokenState
from madtp.tokens.windows import WindowRows, sorts_by_window, window_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Probabilities of a sample from which a CPU is faster with memory that all samples share.
SCRATCH_FROM = 2**16


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    *,
    query_state: TokenState | None = None,
    key_state: TokenState | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """Scaled dot-product attention where queries, keys or both are packed rows.

    Args:
        query: ``[1, H, T, D]`` rows of ``query_state``; ``[B, H, Q, D]`` without one, or while nothing was pruned.
        key: ``[1, H, T, D]`` rows of ``key_state``; ``[B, H, K, D]`` without one, or while nothing was pruned.
        value: as ``key``.
        mask: boolean (True where a query sees a key) or additive, broadcastable to ``[B, H, Q0, K0]``: over the *original*
            tokens.
        dropout_p: dropout probability of the attention weights.
        causal: a token sees only earlier ones.
        query_state: state of the rows of the queries; None if they are not packed.
        key_state: state of the rows of the keys; None if they are not packed.
        **options: see :class:`~madtp.tokens.attention.AttentionOptions`.

    Returns:
        In the form of the queries: ``[1, H, T, Dv]`` or ``[B, H, Q, Dv]``.
    """
    inputs = AttentionInputs(query, key, value, mask, dropout_p, causal, **options)
    return _attend(inputs, _packed(query_state), _packed(key_state))


def _attend(inputs: AttentionInputs, query_state: TokenState | None, key_state: TokenState | None) -> Tensor:
    """The output in the form of the queries; values without a state are not packed."""
    if inputs.windows is not None and query_state is not None and _sorts(query_state):
        rows, own = _by_window(inputs, query_state)
        return rows.back(_attend(own, rows.state, rows.state), 2)
    inputs = _without_idle_mask(inputs, key_state)
    if _is_regular(query_state) and _is_regular(key_state):
        slots = in_batch(inputs, query_state, key_state).over_survivors(query_state, key_state, None)
        output = plain_attention(slots)
        return output if query_state is None else _in_rows(output)
    if inputs.query.device.type != "cpu":
        return attend_on_device(inputs, query_state, key_state)
    inputs = inputs.ungrouped()
    if is_plain(inputs):
        operands = zip(
            _each(inputs.query, query_state), _each(inputs.key, key_state), _each(inputs.value, key_state), strict=True
        )
        outputs = [F.scaled_dot_product_attention(q, k, v, scale=inputs.scale) for q, k, v in operands]
    else:
        outputs = [plain_attention(one) for one in each_sample(inputs, query_state, key_state)]
    return torch.cat(outputs, 0) if query_state is None else _joined_rows(outputs)


def packed_attention_with_statistics(
    inputs: AttentionInputs, state: TokenState, asked: Asked
) -> tuple[Tensor, AttentionStatistics[Tensor]]:
    """Return the output of a self-attention of packed rows together with the statistics of DTP.

    Args:
        inputs: rows ``[1, H, T, D]``, or ``[B, H, N, D]`` while nothing was pruned, with a mask over the original tokens.
        state: state of the rows.
        asked: what is asked.

    Returns:
        output in the form of the queries, and the statistics in the padded form, with zeros on padding.
    """
    if state.index is None:
        return attention_with_sampled_statistics(inputs, asked)
    if inputs.windows is not None and _sorts(state):
        return _observe_windows(inputs, state, asked)
    inputs = _without_idle_mask(inputs, state)
    if _is_regular(state):
        # The rows of a single sample have its slots already; an exporter must not tell it from others.
        alone = not is_compiling() and state.batch == 1
        slots = (inputs if alone else in_batch(inputs, state, state)).over_survivors(state, state, None)
        output, statistics = attention_with_sampled_statistics(slots, asked)
        return output if alone else _in_rows(output), statistics
    if inputs.query.device.type != "cpu":
        return observe_on_device(inputs, state, asked)
    inputs = inputs.ungrouped()
    each = _asked_of_each(asked, state)
    if is_plain(inputs) and _takes_whole_maps(inputs, state, asked):
        output, received, seen = _observe_maps(inputs, state, each)
    else:
        observed = [observe_sample(*one) for one in zip(_plain_or_masked(inputs, state), each, strict=True)]
        output = torch.cat([one.output for one in observed], 0)
        received = [one.received for one in observed if one.received is not None]
        seen = [one.class_attention for one in observed if one.class_attention is not None]
    return output.unsqueeze(0).transpose(1, 2), AttentionStatistics(
        received=in_slots(joined(received, 0), state) if received else None,
        class_attention=in_slots(joined(seen, 0), state) if seen else None,
    )


def _sorts(state: TokenState) -> bool:
    """Whether rows are sorted by their windows; a compiler must not follow."""
    return not is_compiling() and sorts_by_window(state)


def _by_window(inputs: AttentionInputs, state: TokenState) -> tuple[WindowRows, AttentionInputs]:
    """The rows sorted by their windows, which are samples of an attention without windows then."""
    assert inputs.windows is not None
    assert inputs.mask is None
    assert not inputs.causal
    rows = window_rows(state, inputs.windows, inputs.query.device)
    query, key, value = (x.index_select(2, rows.order) for x in (inputs.query, inputs.key, inputs.value))
    return rows, replace(inputs, query=query, key=key, value=value, windows=None)


def _observe_windows(
    inputs: AttentionInputs, state: TokenState, asked: Asked
) -> tuple[Tensor, AttentionStatistics[Tensor]]:
    rows, own = _by_window(inputs, state)
    counted = counted_within_windows(asked, state.batch, state.length, inputs.query.device)
    counted = in_slots(in_rows(counted, state)[rows.order], rows.state)
    output, statistics = packed_attention_with_statistics(own, rows.state, replace(asked, counted=counted))
    received = statistics.received
    if received is not None:
        received = in_slots(rows.back(in_rows(received, rows.state), 0), state)
    return rows.back(output, 2), AttentionStatistics(received, None)


def _asked_of_each(asked: Asked, state: TokenState) -> list[Asked]:
    """What is asked of each sample."""
    counted, batch, slots = asked.counted, state.batch, asked.class_slot
    parts: Sequence[Counted] = [counted] * batch
    if isinstance(counted, Tensor):
        parts = torch.split(in_rows(counted, state), list(lengths_of(state)))
    elif not isinstance(slots, Tensor):
        return [asked] * batch
    # On a CPU the host does not wait for this.
    each = slots.tolist() if isinstance(slots, Tensor) else [slots] * batch
    return [replace(asked, counted=part, class_slot=slot) for part, slot in zip(parts, each, strict=True)]


def _takes_whole_maps(inputs: AttentionInputs, state: TokenState, asked: Asked) -> bool:
    """Whether the statistics of every sample come from its whole map, which is small."""
    longest = max(lengths_of(state))
    asks_all = asked.received and (asked.queries is None or longest <= asked.queries)
    return asks_all and inputs.query.size(1) * longest**2 <= WHOLE_MAP


def _observe_maps(
    inputs: AttentionInputs, state: TokenState, each: list[Asked]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output ``[T, H, Dv]``, the attention received by each sample's keys, and the class attention, in one part."""
    heads, width = inputs.query.size(1), inputs.query.size(3)
    query = inputs.query * (width**-0.5 if inputs.scale is None else inputs.scale)
    operands = (_each(rows.squeeze(0), state) for rows in (query, inputs.key, inputs.value))
    largest = heads * max(lengths_of(state)) ** 2
    scratch = Scratch(query, largest) if shares_memory(inputs) and largest > SCRATCH_FROM else None
    observed = [observe_heads(q, k, v, own, scratch) for q, k, v, own in zip(*operands, each, strict=True)]
    output = torch.cat([one.output for one in observed], 0)
    rows = [one.class_row for one in observed if one.class_row is not None]
    seen = [seen_by(torch.cat(rows, 1), output.transpose(0, 1), 0, each[0])] if rows else []
    return output, [one.received for one in observed], seen


def _plain_or_masked(inputs: AttentionInputs, state: TokenState) -> list[AttentionInputs]:
    """The inputs of each sample."""
    if not is_plain(inputs):
        return each_sample(inputs, state, state)
    operands = zip(*(_each(one, state) for one in (inputs.query, inputs.key, inputs.value)), strict=True)
    return [replace(inputs, query=query, key=key, value=value) for query, key, value in operands]


def _without_idle_mask(inputs: AttentionInputs, key_state: TokenState | None) -> AttentionInputs:
    """The inputs without a mask that hides no surviving key, as the padding mask of a text whose padding was dropped."""
    mask = inputs.mask
    if mask is None or key_state is None or (key_state.rows is None and key_state.valid is not None):
        return inputs
    full = mask[(None,) * (4 - mask.dim())]
    if full.size(1) > 1 or full.size(2) > 1:
        return inputs
    return replace(inputs, mask=None) if hides_nothing(side_input_rows(full, key_state, 3, 0, 4)) else inputs


def _packed(state: TokenState | None) -> TokenState | None:
    """The state of packed rows; None for values that keep their batch, as all do while nothing was pruned."""
    return None if state is None or state.index is None else state


def _is_regular(state: TokenState | None) -> bool:
    """Whether all samples have equally many rows."""
    return state is None or state.rows is None


def in_batch(inputs: AttentionInputs, query_state: TokenState | None, key_state: TokenState | None) -> AttentionInputs:
    """Return the inputs with a batch dimension ``[B, H, N, D]``, as views; all samples have equally many rows."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if query_state is not None:
        query = _batched(query, query_state)
    if key_state is not None:
        key, value = _batched(key, key_state), _batched(value, key_state)
    return replace(inputs, query=query, key=key, value=value)


def _batched(rows: Tensor, state: TokenState) -> Tensor:
    slots: Tensor = rows.unflatten(2, (state.batch, state.length))
    return slots.squeeze(0).transpose(0, 1)


def _in_rows(output: Tensor) -> Tensor:
    """``[B, H, N, D]`` as rows ``[1, H, T, D]``; a view where the kernel put a token's heads next to each other."""
    return output.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def _joined_rows(outputs: list[Tensor]) -> Tensor:
    """Outputs ``[1, H, Q, D]`` of the samples as rows ``[1, H, T, D]``, a token's heads next to each other."""
    return torch.cat([output.transpose(1, 2) for output in outputs], 1).transpose(1, 2)


def each_sample(
    inputs: AttentionInputs, query_state: TokenState | None, key_state: TokenState | None
) -> list[AttentionInputs]:
    """Return the inputs of each sample, ``[1, H, Q, D]`` and ``[1, H, K, D]``, each with a mask over its own tokens."""
    inputs = inputs.ungrouped()
    queries = _each(inputs.query, query_state)
    keys, values = _each(inputs.key, key_state), _each(inputs.value, key_state)
    masks = _masks(inputs, query_state, key_state, [query.size(2) for query in queries])
    return [
        replace(inputs, query=query, key=key, value=value, mask=mask, causal=False)
        for query, key, value, mask in zip(queries, keys, values, masks, strict=True)
    ]


def _each(values: Tensor, state: TokenState | None) -> tuple[Tensor, ...]:
    """The values of each sample: of rows ``[..., T, D]``, or of a batch ``[B, H, N, D]``."""
    return torch.split(values, 1) if state is None else torch.split(values, list(lengths_of(state)), -2)


def _masks(
    inputs: AttentionInputs, query_state: TokenState | None, key_state: TokenState | None, queries: list[int]
) -> list[Tensor | None]:
    """The mask of each sample; causality becomes a part of it, and padding that takes up slots is hidden."""
    batch = len(queries)
    masks: list[Tensor | None] = [None] * batch
    if inputs.mask is not None:
        masks = list(_mask_of_each(inputs.mask[(None,) * (4 - inputs.mask.dim())], query_state, key_state, batch))
    if inputs.causal:
        rows = _positions(query_state, inputs.query, batch)
        columns = _positions(key_state, inputs.key, batch)
        for sample, mask in enumerate(masks):
            order = rows[sample][:, None] >= columns[sample][None]
            masks[sample] = order[None, None] if mask is None else join_masks(mask, order)
    if key_state is not None and key_state.rows is None and key_state.valid is not None:
        for sample, mask in enumerate(masks):
            valid = key_state.valid[sample : sample + 1, None, None]
            masks[sample] = valid if mask is None else join_masks(mask, valid)
    return masks


def _mask_of_each(
    mask: Tensor, query_state: TokenState | None, key_state: TokenState | None, batch: int
) -> tuple[Tensor, ...]:
    """The rows and columns ``[1, H, Q, K]`` of a mask over the original tokens that belong to each sample."""
    if key_state is not None and mask.size(2) == 1:
        return torch.split(side_input_rows(mask, key_state, 3, 0, 4), list(lengths_of(key_state)), 3)
    if query_state is not None and mask.size(3) == 1:
        return torch.split(side_input_rows(mask, query_state, 2, 0, 4), list(lengths_of(query_state)), 2)
    parts = torch.split(mask.expand(batch, -1, -1, -1), 1)
    for state, dim in ((query_state, 2), (key_state, 3)):
        if state is not None and mask.size(dim) > 1:
            positions = torch.split(row_positions(state, mask.device), list(lengths_of(state)))
            parts = tuple(part.index_select(dim, own) for part, own in zip(parts, positions, strict=True))
    return parts


def _positions(state: TokenState | None, values: Tensor, batch: int) -> tuple[Tensor, ...]:
    """Original positions of the tokens of each sample."""
    if state is None:
        return (torch.arange(values.size(2), device=values.device),) * batch
    return torch.split(row_positions(state, values.device), list(lengths_of(state)))
