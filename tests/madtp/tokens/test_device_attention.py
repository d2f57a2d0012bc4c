"""The forms of packed attention for GPUs compute what the form for CPUs computes; they run here on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from madtp.tokens import device_attention
from madtp.tokens.attention import AttentionInputs
from madtp.tokens.packed_attention import packed_attention, packed_attention_with_statistics
from madtp.tokens.packed_rows import packed_rows
from madtp.tokens.scored_attention import Asked
from madtp.tokens.state import TokenState

HEADS, WIDTH, FULL = 2, 4, 9


@st.composite
def states(draw: st.DrawFn, batch: int) -> TokenState:
    """States whose samples have different numbers of tokens."""
    lengths = draw(
        st.lists(st.integers(1, FULL - 1), min_size=batch, max_size=batch).filter(lambda own: len(set(own)) > 1)
    )
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    longest = max(lengths)
    index = np.stack([np.sort(generator.permutation(FULL)[:longest]) for _ in lengths])
    valid = np.arange(longest) < np.array(lengths)[:, None]
    return TokenState(
        full_length=FULL,
        length=longest,
        batch=batch,
        index=torch.from_numpy(np.where(valid, index, 0)),
        valid=torch.from_numpy(valid),
        merged=torch.zeros(batch, longest, dtype=torch.bool),
        rows=packed_rows(lengths, longest, torch.device("cpu")),
    )


def rows_of(state: TokenState | None, batch: int) -> Tensor:
    if state is None:
        return torch.randn(batch, HEADS, FULL, WIDTH)
    return torch.randn(1, HEADS, int(state.counts.sum()), WIDTH)


def mask_of(kind: str, batch: int) -> Tensor | None:
    if kind == "none":
        return None
    shown = torch.rand(batch, 1, 1 if kind == "keys" else FULL, FULL) > 0.3
    shown[..., 0] = True
    return torch.where(shown, torch.randn(shown.shape), -torch.inf) if kind == "added" else shown


KINDS = st.sampled_from(["none", "keys", "rows", "added"])


@settings(deadline=None)
@given(st.data(), st.integers(2, 4), KINDS, st.booleans(), st.sampled_from(["both", "queries", "keys"]))
def test_padding_for_a_kernel_that_all_samples_share(
    data: st.DataObject, batch: int, kind: str, causal: bool, packed: str
) -> None:
    torch.manual_seed(0)
    state = data.draw(states(batch))
    query_state, key_state = (state if packed in ("both", name) else None for name in ("queries", "keys"))
    query, key, value = rows_of(query_state, batch), rows_of(key_state, batch), rows_of(key_state, batch)
    inputs = AttentionInputs(query, key, value, mask_of(kind, batch), 0.0, causal, scale=0.7)
    wanted = packed_attention(
        query, key, value, inputs.mask, 0.0, causal, query_state=query_state, key_state=key_state, scale=0.7
    )
    found = device_attention.attend_on_device(inputs, query_state, key_state)
    torch.testing.assert_close(found, wanted, equal_nan=True)


@settings(deadline=None)
@given(st.data(), st.integers(2, 4), KINDS, st.booleans(), st.none() | st.integers(1, 4))
def test_statistics_of_all_samples_at_once(
    data: st.DataObject, batch: int, kind: str, causal: bool, queries: int | None
) -> None:
    torch.manual_seed(0)
    state = data.draw(states(batch))
    inputs = AttentionInputs(*(rows_of(state, batch) for _ in range(3)), mask_of(kind, batch), 0.0, causal)
    assert state.valid is not None
    counted = data.draw(st.sampled_from([0, 1, state.valid & (torch.rand(state.valid.shape) > 0.3)]))
    asked = Asked(counted=counted, class_slot=0, queries=queries)
    wanted = packed_attention_with_statistics(inputs, state, asked)
    found = device_attention.observe_on_device(inputs, state, asked)
    torch.testing.assert_close(found[0], wanted[0], equal_nan=True)
    for name in ("received", "class_attention"):
        own, other = (getattr(one, name).where(state.valid, 0) for one in (found[1], wanted[1]))
        torch.testing.assert_close(own, other, equal_nan=True)


def by_sample(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, longest: int, longest_key: int
) -> Tensor:
    """What torch's kernel for sequences of different lengths computes."""
    assert starts.dtype == key_starts.dtype == torch.int32
    parts = []
    for first, last, key_first, key_last in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        assert last - first <= longest
        assert key_last - key_first <= longest_key
        own = (query[first:last], key[key_first:key_last], value[key_first:key_last])
        parts.append(F.scaled_dot_product_attention(*(one.transpose(0, 1) for one in own)).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("packed", ["both", "queries", "keys"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_kernel_for_different_lengths(packed: str, scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen: Any = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", by_sample)
    torch.manual_seed(0)
    lengths = (3, 1, 5)
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    rows = packed_rows(lengths, 5, torch.device("cpu"))
    index = torch.arange(5).expand(3, 5)
    state = TokenState(full_length=FULL, length=5, batch=3, index=index, valid=valid, merged=~valid & False, rows=rows)
    query_state, key_state = (state if packed in ("both", name) else None for name in ("queries", "keys"))
    query, key, value = (rows_of(own, 3).bfloat16() for own in (query_state, key_state, key_state))
    inputs = AttentionInputs(query, key, value, None, 0.0, False, scale=scale)
    wanted = packed_attention(query, key, value, query_state=query_state, key_state=key_state, scale=scale)
    found = device_attention.attend_on_device(inputs, query_state, key_state)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
