"""Survivors attend within their windows, whatever form they run in: packed rows, padded slots, on a GPU."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from rewritten_models import gap
from torch import Tensor

from madtp.tokens.attention import AttentionInputs, attention
from madtp.tokens.device_attention import attend_on_device, observe_on_device
from madtp.tokens.packed_attention import packed_attention, packed_attention_with_statistics
from madtp.tokens.packed_rows import packed_rows
from madtp.tokens.packing import in_rows, in_slots, to_rows, to_slots
from madtp.tokens.sampled_scores import attention_with_sampled_statistics
from madtp.tokens.scored_attention import Asked
from madtp.tokens.state import TokenState
from madtp.tokens.windows import window_rows

WINDOWS = (8, 14, 2, 12)
TOKENS = sum(WINDOWS)


def pruned_state(counts: list[int], generator: torch.Generator) -> TokenState:
    """Samples that keep as many tokens; the last of each is a merged one, out of order."""
    length = max(counts)
    index, valid = (
        torch.zeros(len(counts), length, dtype=torch.long),
        torch.zeros(len(counts), length, dtype=torch.bool),
    )
    for sample, count in enumerate(counts):
        kept = torch.randperm(TOKENS, generator=generator)[:count]
        index[sample, :count] = torch.cat([kept[1:].sort().values, kept[:1]])
        valid[sample, :count] = True
    rows = packed_rows(counts, length, index.device)
    return TokenState(
        full_length=TOKENS,
        length=length,
        batch=len(counts),
        index=index,
        valid=None if rows is None else valid,
        merged=torch.zeros_like(valid),
        rows=rows,
    )


def drawn(counts: list[int], seed: int) -> tuple[TokenState, tuple[Tensor, Tensor, Tensor]]:
    """A state, and queries, keys and values in rows."""
    generator = torch.Generator().manual_seed(seed)
    state = pruned_state(counts, generator)
    query, key, value = torch.randn(3, 1, 2, sum(counts), 4, generator=generator).unbind(0)
    return state, (query, key, value)


COUNTS = st.lists(st.integers(1, TOKENS), min_size=1, max_size=4)


@given(COUNTS, st.integers(0, 99))
def test_packed_rows_see_what_a_mask_over_windows_shows(counts: list[int], seed: int) -> None:
    state, rows = drawn(counts, seed)
    slots = [to_slots(x, state, 2, 0) for x in rows]
    of_each = torch.arange(len(WINDOWS)).repeat_interleave(torch.tensor(WINDOWS))
    mask = (of_each[:, None] == of_each)[None, None]
    wanted = attention(*slots, mask, query_state=state, key_state=state)
    padded = attention(*slots, query_state=state, key_state=state, windows=WINDOWS)
    packed = packed_attention(*rows, query_state=state, key_state=state, windows=WINDOWS)
    assert gap(to_rows(wanted, state, 2, 0), to_rows(padded, state, 2, 0)) < 1e-5
    assert gap(to_rows(wanted, state, 2, 0), packed) < 1e-5


@given(COUNTS, st.integers(0, 99), st.integers(0, 2))
def test_statistics_are_those_within_windows(counts: list[int], seed: int, protected: int) -> None:
    state, rows = drawn(counts, seed)
    slots = [to_slots(x, state, 2, 0) for x in rows]
    inputs = AttentionInputs(*slots, None, 0.0, False, windows=WINDOWS).over_survivors(state, state, None)
    counted = (torch.arange(state.length) >= protected).expand(len(counts), -1)
    counted = counted if state.valid is None else counted & state.valid
    _, wanted = attention_with_sampled_statistics(inputs, Asked(counted=counted))
    packed = AttentionInputs(*rows, None, 0.0, False, windows=WINDOWS)
    _, found = packed_attention_with_statistics(packed, state, Asked(counted=protected))
    assert found.class_attention is None
    assert wanted.received is not None
    assert found.received is not None
    assert gap(in_rows(wanted.received, state), in_rows(found.received, state)) < 1e-5


def test_kernels_of_a_gpu_take_windows_as_samples() -> None:
    state, rows = drawn([20, 9, 15], 0)
    asked = Asked(counted=0)
    inputs = AttentionInputs(*rows, None, 0.0, False, windows=WINDOWS)
    wanted, statistics = packed_attention_with_statistics(inputs, state, asked)
    own = window_rows(state, WINDOWS, torch.device("cpu"))
    inputs = AttentionInputs(*(x.index_select(2, own.order) for x in rows), None, 0.0, False)
    assert gap(wanted, own.back(attend_on_device(inputs, own.state, own.state), 2)) < 1e-5
    output, found = observe_on_device(inputs, own.state, asked)
    assert gap(wanted, own.back(output, 2)) < 1e-5
    assert statistics.received is not None
    assert found.received is not None
    assert gap(statistics.received, in_slots(own.back(in_rows(found.received, own.state), 0), state)) < 1e-5
