"""Attention over packed rows of a GPU, where a kernel for each sample would take longer to start than to run.

Start at :func:`attend_on_device`. In half precision, torch's kernel for sequences of different lengths takes the rows as they
are. Elsewhere, and for the statistics of DTP, rows go to the padded form, whose samples share each kernel.

Axis legend: B samples, H heads, Q and K queries and keys of a sample, T rows of all samples, D head width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from madtp.method.importance import AttentionStatistics
from madtp.tokens.attention import AttentionInputs, plain_attention
from madtp.tokens.packing import lengths_of, to_rows, to_slots
from madtp.tokens.sampled_scores import attention_with_sampled_statistics
from madtp.tokens.scored_attention import Asked, is_plain
from madtp.tokens.state import TokenState

HALF = (torch.float16, torch.bfloat16)


def attend_on_device(inputs: AttentionInputs, query_state: TokenState | None, key_state: TokenState | None) -> Tensor:
    """Return the output of an attention in the form of the queries: rows ``[1, H, T, Dv]``, or ``[B, H, Q, Dv]``.

    Args:
        inputs: rows ``[1, H, T, D]`` of what has a state, ``[B, H, N, D]`` of the rest; the mask is over the original tokens.
        query_state: state of the rows of the queries; None if they are not packed.
        key_state: state of the rows of the keys; None if they are not packed.
    """
    inputs = inputs.ungrouped()
    if is_plain(inputs) and inputs.query.dtype in HALF and inputs.query.size(3) == inputs.value.size(3):
        return _by_lengths(inputs, query_state, key_state)
    output = plain_attention(_padded(inputs, query_state, key_state))
    return output if query_state is None else to_rows(output, query_state, 2, 0)


def observe_on_device(
    inputs: AttentionInputs, state: TokenState, asked: Asked
) -> tuple[Tensor, AttentionStatistics[Tensor]]:
    """Return the output ``[1, H, T, Dv]`` of a self-attention of packed rows, and its statistics in the padded form."""
    if not isinstance(asked.counted, Tensor) and state.valid is not None:
        behind = torch.arange(state.length, device=inputs.query.device) >= asked.counted
        asked = replace(asked, counted=state.valid & behind)
    slots = _padded(inputs.ungrouped(), state, state)
    output, statistics = attention_with_sampled_statistics(slots, asked)
    return to_rows(output, state, 2, 0), statistics


def _padded(inputs: AttentionInputs, query_state: TokenState | None, key_state: TokenState | None) -> AttentionInputs:
    """The inputs in the padded form ``[B, H, N, D]``, with a mask over the tokens that are present."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if query_state is not None:
        query = to_slots(query, query_state, 2, 0)
    if key_state is not None:
        key, value = to_slots(key, key_state, 2, 0), to_slots(value, key_state, 2, 0)
    return replace(inputs, query=query, key=key, value=value).over_survivors(query_state, key_state, None)


def _by_lengths(inputs: AttentionInputs, query_state: TokenState | None, key_state: TokenState | None) -> Tensor:
    """One kernel for sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn  # not in every build of torch

    query, key, value = (
        rows.transpose(1, 2).flatten(0, 1).contiguous() for rows in (inputs.query, inputs.key, inputs.value)
    )
    if inputs.scale is not None:
        query = query * (inputs.scale * query.size(2) ** 0.5)
    queries, keys = _lengths(inputs.query, query_state), _lengths(inputs.key, key_state)
    output = varlen_attn(query, key, value, _starts(queries, query), _starts(keys, query), max(queries), max(keys))
    assert isinstance(output, Tensor)  # without the logarithms of the sums, which nobody asks for
    output = output.unsqueeze(0)
    if query_state is None:
        output = output.reshape(inputs.query.size(0), inputs.query.size(2), *output.shape[2:])
    return output.transpose(1, 2)


def _lengths(values: Tensor, state: TokenState | None) -> tuple[int, ...]:
    """Number of tokens of each sample."""
    return (values.size(2),) * values.size(0) if state is None else lengths_of(state)


def _starts(lengths: tuple[int, ...], like: Tensor) -> Tensor:
    """``[B + 1]`` int32, the rows before each sample."""
    starts = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return starts.to(like.device, non_blocking=True)
