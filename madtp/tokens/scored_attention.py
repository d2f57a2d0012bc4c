"""Attention that also yields the statistics of DTP, which the importance needs (``docs/method.md``, "Importance").

Start at :func:`attention_with_statistics`. The statistics need every probability once, so the attention map has to exist; a
kernel that never makes it cannot tell them. There are three ways to make it, of which the size decides:

- on a CPU without gradients, one sample after the other in memory that all share, which stays in its cache; head by head
  where the map of a sample is large;
- all samples at once where that is small;
- blocks of samples or queries elsewhere.

Axis legend: B samples, H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from madtp.calls.compiling import is_compiling
from madtp.method.arrays import precise
from madtp.method.importance import AttentionStatistics, class_attention
from madtp.tokens.attention import (
    QUERY_BLOCK,
    AttentionInputs,
    hides_nothing,
    joined,
    probability_blocks,
    queries_without_keys,
    weighted,
)

# Probabilities per block on a CPU: as many as stay in its cache.
CPU_BLOCK = 2**19
# Probabilities of one sample up to which a CPU is faster with its whole map than with several blocks.
WHOLE_MAP = 5 * 2**18
# Probabilities of one sample from which a CPU works off samples one by one.
SMALL_MAP = 2**14

Operand = TypeVar("Operand", Tensor, Tensor | None, Tensor | int, Tensor | int | None)
Slot: TypeAlias = Tensor | int
Counted: TypeAlias = Tensor | int
"""The queries that count in the attention that a key receives: ``[B, Q]`` bool, or the first, if all after it count, too."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an attention is asked about its tokens.

    Attributes:
        counted: the queries that count in the attention that a key receives.
        class_slot: slot whose row is the class attention, ``[B]`` or one for all samples, -1 for a sample that has no such
            token. None if the stream has none, or if nobody asks.
        by_output: whether the class attention weighs each head by its output at the key; else heads count alike.
        received: whether the attention that keys receive is asked.
        queries: how many queries it is taken from; None for all. See ``sampled_scores.py``.
    """

    counted: Counted = 0
    class_slot: Slot | None = None
    by_output: bool = True
    received: bool = True
    queries: int | None = None


def seen_by(row: Tensor, output: Tensor, head_dim: int, asked: Asked) -> Tensor:
    """Return the class attention t from its row; see :func:`~madtp.method.importance.class_attention` for the arguments."""
    return class_attention(row, output, head_dim) if asked.by_output else row.mean(head_dim)


def attention_with_statistics(inputs: AttentionInputs, asked: Asked) -> tuple[Tensor, AttentionStatistics[Tensor]]:
    """Return the output of an attention together with the statistics of DTP, from all of its queries.

    Args:
        inputs: with a mask over the tokens that are present.
        asked: what is asked.

    Returns:
        output ``[B, H, Q, Dv]`` and its statistics.
    """
    inputs = inputs.ungrouped()
    if inputs.mask is not None:
        mask = inputs.mask[(None,) * (4 - inputs.mask.dim())]
        inputs = replace(inputs, mask=None if hides_nothing(mask) else mask)
    batch, heads, queries, _ = inputs.query.shape
    size = heads * queries * inputs.key.size(2)
    if is_compiling():  # which fuses the steps itself, and needs one form for all sizes of a batch
        if is_plain(inputs):
            observed = _at_once(inputs, asked)
        else:
            observed = _collect(inputs, queries_without_keys(inputs), asked, queries)
    elif is_plain(inputs) and shares_memory(inputs) and size >= SMALL_MAP:
        if size > WHOLE_MAP:
            observed = _head_by_head(inputs, asked)
        elif batch == 1 and size <= CPU_BLOCK and not isinstance(asked.counted, Tensor):
            observed = _alone(inputs, asked)
        else:
            observed = _sample_by_sample(inputs, asked)
    elif _is_small(inputs):
        observed = _at_once(inputs, asked)
    else:
        observed = _in_blocks(inputs, asked)
    row = observed.class_row
    seen = None if row is None else seen_by(row, observed.output, 1, asked)
    return observed.output, AttentionStatistics(observed.received, seen)


class Observed(NamedTuple):
    """Output ``[B, H, Q, Dv]``, attention received ``[B, K]``, and the class row ``[B, H, K]`` if it was asked for."""

    output: Tensor
    received: Tensor
    class_row: Tensor | None


class Scratch:
    """Memory for the attention maps of one sample after the other.

    Fresh memory of some megabytes costs a CPU more than the arithmetic on it, and leaves its cache.

    Args:
        like: a tensor of the type and on the device of the scores.
        largest: number of probabilities of the largest map.
    """

    def __init__(self, like: Tensor, largest: int) -> None:
        self.scores, self.probabilities = like.new_empty(largest), like.new_empty(largest)

    def maps(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Two maps of a shape; what they held is lost."""
        size = math.prod(shape)
        return self.scores[:size].view(shape), self.probabilities[:size].view(shape)


def shares_memory(inputs: AttentionInputs) -> bool:
    """Whether results may be written to memory that is used again: on a CPU, without gradients."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if query.device.type != "cpu" or not query.dtype == key.dtype == value.dtype == torch.float32:
        return False
    return not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad)


def observe_heads(query: Tensor, key: Tensor, value: Tensor, asked: Asked, scratch: Scratch | None = None) -> Observed:
    """Return the output and statistics of one sample in as few steps as possible.

    Args:
        query: ``[H, N, D]``, scaled.
        key: ``[H, N, D]``.
        value: ``[H, N, Dv]``.
        asked: what is asked of this sample; queries that count are those from a slot on, or ``[N]`` bool.
        scratch: memory for the map, where :func:`shares_memory`.

    Returns:
        output ``[N, H, Dv]``, received ``[N]`` and class row ``[H, N]``.
    """
    if scratch is None:
        probabilities = torch.bmm(query, key.transpose(1, 2)).softmax(-1, dtype=precise(query.dtype))
    else:
        scores, probabilities = scratch.maps(query.size(0), query.size(1), key.size(1))
        torch.bmm(query, key.transpose(1, 2), out=scores)
        torch.softmax(scores, -1, out=probabilities)
    output = torch.bmm(probabilities.to(value.dtype), value).transpose(0, 1)
    slot = asked.class_slot
    row = None if slot is None else _class_row(probabilities, int(slot))
    if row is not None and scratch is not None:
        row = row.clone()
    return Observed(output, _given_by(probabilities.amax(0), asked.counted), row)


def _given_by(strongest: Tensor, counted: Counted) -> Tensor:
    """The attention ``[K]`` that the keys of one sample receive; ``strongest [Q, K]`` is the largest of all heads."""
    if isinstance(counted, Tensor):
        return torch.mv(strongest.t(), counted.to(strongest.dtype))
    return (strongest[counted:] if counted else strongest).sum(0)


def _given_by_all(strongest: Tensor, counted: Counted) -> Tensor:
    """The attention ``[B, K]`` that the keys of all samples receive; ``strongest`` is ``[B, Q, K]``."""
    if isinstance(counted, Tensor):
        return torch.bmm(counted.to(strongest.dtype).unsqueeze(1), strongest).squeeze(1)
    return (strongest[:, counted:] if counted else strongest).sum(1)


def _alone(inputs: AttentionInputs, asked: Asked) -> Observed:
    """The whole map of a single sample."""
    query = inputs.query[0] * (inputs.query.size(3) ** -0.5 if inputs.scale is None else inputs.scale)
    slot = int(asked.class_slot) if isinstance(asked.class_slot, Tensor) else asked.class_slot
    output, received, row = observe_heads(query, inputs.key[0], inputs.value[0], replace(asked, class_slot=slot))
    row = None if row is None else row.unsqueeze(0)
    return Observed(output.transpose(0, 1).unsqueeze(0), received.unsqueeze(0), row)


def _sample_by_sample(inputs: AttentionInputs, asked: Asked) -> Observed:
    query, key, value, counted, class_slot = inputs.query, inputs.key, inputs.value, asked.counted, asked.class_slot
    batch, heads, queries, width = query.shape
    keys = key.size(2)
    query = query * (width**-0.5 if inputs.scale is None else inputs.scale)
    weights = counted.to(query.dtype) if isinstance(counted, Tensor) else None
    slots: list[int] = class_slot.tolist() if isinstance(class_slot, Tensor) else [class_slot or 0] * batch
    output = query.new_empty(batch, queries, heads, value.size(3))
    received = query.new_empty(batch, keys)
    class_row = None if class_slot is None else query.new_empty(batch, heads, keys)
    scratch, mixed = Scratch(query, heads * queries * keys), query.new_empty(heads, queries, value.size(3))
    scores, probabilities = scratch.maps(heads, queries, keys)
    strongest = query.new_empty(queries, keys)
    by_key, rest = strongest.t(), strongest if isinstance(counted, Tensor) else strongest[counted:]
    for sample in range(batch):
        torch.bmm(query[sample], key[sample].transpose(1, 2), out=scores)
        torch.softmax(scores, -1, out=probabilities)
        torch.amax(probabilities, 0, out=strongest)
        if weights is None:
            torch.sum(rest, 0, out=received[sample])
        else:
            torch.mv(by_key, weights[sample], out=received[sample])
        torch.bmm(probabilities, value[sample], out=mixed)
        output[sample] = mixed.transpose(0, 1)
        if class_row is not None:
            class_row[sample] = _class_row(probabilities, slots[sample])
    return Observed(output.transpose(1, 2), received, class_row)


def _is_small(inputs: AttentionInputs) -> bool:
    """Whether the map of all samples can be made at once, with nothing in between but a scale."""
    batch, heads, queries, _ = inputs.query.shape
    block = CPU_BLOCK if batch > 1 else WHOLE_MAP
    fits = inputs.query.device.type == "cpu" and batch * heads * queries * inputs.key.size(2) <= block
    return fits and is_plain(inputs)


def _at_once(inputs: AttentionInputs, asked: Asked) -> Observed:
    query, key, value = inputs.query, inputs.key, inputs.value
    factor = query.size(-1) ** -0.5 if inputs.scale is None else inputs.scale
    scores = (query * factor) @ key.transpose(2, 3)
    probabilities = scores.softmax(-1, dtype=precise(scores.dtype))
    received = _given_by_all(probabilities.amax(1), asked.counted)
    class_row = None if asked.class_slot is None else _row(probabilities, asked.class_slot)
    return Observed(probabilities.to(value.dtype) @ value, received, class_row)


def _class_row(probabilities: Tensor, slot: int) -> Tensor:
    """The row ``[H, K]`` of one query of ``[H, Q, K]``; zeros for a slot that a shorter stream does not have."""
    if 0 <= slot < probabilities.size(1):
        return probabilities[:, slot]
    return probabilities.new_zeros(probabilities.size(0), probabilities.size(2))


def _row(probabilities: Tensor, slot: Slot) -> Tensor:
    """The row ``[B, H, K]`` of one query of each sample of ``[B, H, Q, K]``; zeros as in :func:`_class_row`."""
    queries = probabilities.size(2)
    if isinstance(slot, int):
        row = probabilities[:, :, min(max(slot, 0), queries - 1)]
        return row if 0 <= slot < queries else torch.zeros_like(row)
    inside = (slot >= 0) & (slot < queries)
    row = probabilities[torch.arange(slot.size(0), device=slot.device), :, slot.clamp(0, queries - 1)]
    return row * inside[:, None, None]


def is_plain(inputs: AttentionInputs) -> bool:
    """Whether scores are products of queries and keys, times a scale, and nothing else."""
    return inputs.mask is None and not inputs.causal and inputs.softcap is None and inputs.dropout_p == 0


def _head_by_head(inputs: AttentionInputs, asked: Asked) -> Observed:
    """The map ``[Q, K]`` of one head at a time, in memory that all heads share."""
    query, key, value, class_slot = inputs.query, inputs.key, inputs.value, asked.class_slot
    batch, heads, queries, width = query.shape
    keys = key.size(2)
    factor = width**-0.5 if inputs.scale is None else inputs.scale
    output = query.new_empty(batch, queries, heads, value.size(3)).transpose(1, 2)
    received = query.new_empty(batch, keys)
    class_row = None if class_slot is None else query.new_empty(batch, heads, keys)
    scores, strongest = query.new_empty(queries, keys), query.new_empty(queries, keys)
    for sample in range(batch):
        for head in range(heads):
            transposed = key[sample, head].t()
            torch.addmm(scores, query[sample, head], transposed, beta=0, alpha=factor, out=scores)
            weights = strongest if head == 0 else scores
            torch.softmax(scores, -1, out=weights)
            if class_row is not None and class_slot is not None:
                slot = class_slot if isinstance(class_slot, int) else int(class_slot[sample])
                class_row[sample, head] = weights[slot] if 0 <= slot < queries else 0.0
            torch.mm(weights, value[sample, head], out=output[sample, head])
            if head:
                torch.maximum(strongest, weights, out=strongest)
        counted = asked.counted[sample] if isinstance(asked.counted, Tensor) else asked.counted
        received[sample] = _given_by(strongest, counted)
    return Observed(output, received, class_row)


def _in_blocks(inputs: AttentionInputs, asked: Asked) -> Observed:
    """The map of some samples at a time, or of some queries of a sample."""
    batch, heads, queries, _ = inputs.query.shape
    keys = inputs.key.size(2)
    empty = queries_without_keys(inputs)
    # On other devices the question would make the host wait.
    if empty is not None and empty.device.type == "cpu" and not bool(empty.any()):
        empty = None
    block = _rows_per_block(inputs.query, heads * keys)
    if heads * queries * keys <= WHOLE_MAP:
        block = max(block, queries)
    samples = max(1, block // max(1, queries))
    if samples >= batch:
        return _collect(inputs, empty, asked, min(block, queries))
    parts = [
        _collect(part, empty_part, replace(asked, counted=counted, class_slot=slot), min(block, queries))
        for part, empty_part, counted, slot in zip(
            _split_inputs(inputs, samples),
            _split_samples(empty, batch, samples),
            _split_samples(asked.counted, batch, samples),
            _split_samples(asked.class_slot, batch, samples),
            strict=True,
        )
    ]
    class_rows = [part.class_row for part in parts if part.class_row is not None]
    return Observed(
        joined([part.output for part in parts], 0),
        joined([part.received for part in parts], 0),
        joined(class_rows, 0) if class_rows else None,
    )


def _rows_per_block(query: Tensor, probabilities: int) -> int:
    """Rows of a block, over samples and queries; a row is the ``probabilities`` of one query in all heads."""
    if query.device.type == "cpu":
        return max(1, CPU_BLOCK // max(1, probabilities))
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
    if not isinstance(operand, Tensor) or operand.size(0) != batch:
        return [operand] * max(1, -(-batch // samples))
    return torch.split(operand, samples)


def _collect(inputs: AttentionInputs, empty: Tensor | None, asked: Asked, size: int) -> Observed:
    """Blocks of ``size`` queries of all samples; ``empty`` are queries that see no key."""
    value, class_slot = inputs.value, asked.class_slot
    outputs: list[Tensor] = []
    received: Tensor | None = None
    class_row: Tensor | None = None
    for start, stop, probabilities in probability_blocks(inputs, empty, size):
        counted = asked.counted
        counted = counted[:, start:stop] if isinstance(counted, Tensor) else min(max(counted - start, 0), stop - start)
        given = _given_by_all(probabilities.amax(1), counted)
        received = given if received is None else received + given
        if isinstance(class_slot, int):
            if class_row is None or start <= class_slot < stop:
                class_row = _row(probabilities, class_slot - start)
        elif class_slot is not None:
            picked = _row(probabilities, class_slot - start)
            class_row = picked if class_row is None else class_row + picked
        outputs.append(weighted(probabilities, value, inputs.dropout_p))
    assert received is not None
    return Observed(joined(outputs, 2), received, class_row)
