"""Attention that gathers statistics on its way, block by block, against torch's own attention and the whole map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from madtp.method.importance import attention_statistics
from madtp.tokens import attention, sampled_scores, scored_attention

SIZES = st.fixed_dictionaries(
    {
        "batch": st.integers(0, 5),
        "heads": st.integers(1, 3),
        "tokens": st.integers(1, 9),
        "block": st.integers(1, 60),
        "whole": st.sampled_from((0, 10**6)),
        "small": st.sampled_from((0, 10**6)),
        "mask": st.sampled_from(
            ("none", "keys", "rows", "added", "heads", "shared", "causal", "keys, causal", "added, causal")
        ),
        "seed": st.integers(0, 99),
        "first": st.none() | st.integers(0, 3),
    }
)


def mask_of(kind: str, batch: int, heads: int, tokens: int) -> Tensor | None:
    """Masks of which some hide every key of a query."""
    if kind in ("none", "causal"):
        return None
    if kind == "shared":
        return torch.rand(tokens, tokens) > 0.5
    shape = {"keys": (batch, 1, 1, tokens), "heads": (batch, heads, tokens, tokens)}.get(
        kind, (batch, 1, tokens, tokens)
    )
    shown = torch.rand(shape) > 0.4
    return torch.where(shown, torch.randn(shape), -torch.inf) if kind == "added" else shown


def queries_that_count(drawn: dict[str, int | str]) -> tuple[torch.Tensor, torch.Tensor | int]:
    """Which queries count ``[B, N]``, and the same as an attention is told: as it is, or the first of them."""
    batch, tokens, first = drawn["batch"], drawn["tokens"], drawn["first"]
    if first is None:
        rows = torch.rand(batch, tokens) > 0.3
        return rows, rows
    return (torch.arange(tokens) >= first).expand(batch, tokens), first


@settings(deadline=None)
@given(SIZES)
def test_blocks_do_not_change_what_attention_gives_and_tells(drawn: dict[str, int | str]) -> None:
    batch, heads, tokens, kind = drawn["batch"], drawn["heads"], drawn["tokens"], drawn["mask"]
    torch.manual_seed(drawn["seed"])
    query, key, value = (torch.randn(batch, heads, tokens, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    mask, causal = mask_of(kind.removesuffix(", causal"), batch, heads, tokens), "causal" in kind
    rows, counted = queries_that_count(drawn)
    slot = torch.randint(tokens, (batch,))
    asked = scored_attention.Asked(counted=counted, class_slot=slot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored_attention, "CPU_BLOCK", drawn["block"])
        patch.setattr(scored_attention, "WHOLE_MAP", drawn["whole"])
        patch.setattr(scored_attention, "SMALL_MAP", drawn["small"])
        inputs = attention.AttentionInputs(query, key, value, mask, 0.0, causal)
        output, found = scored_attention.attention_with_statistics(inputs, asked)
    added = mask.double() if mask is not None and mask.is_floating_point() else mask
    if mask is None or not causal:  # torch's own does not take both
        torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value, added, is_causal=causal))
    scores = query @ key.transpose(-1, -2) / 2
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    if added is not None:
        scores = scores.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else scores + added
    probabilities = scores.softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(output, probabilities @ value)
    wanted = attention_statistics(probabilities, output, rows, slot)
    for name in ("received", "class_attention"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), atol=1e-6, rtol=1e-5)
    total = output.sum() + found.received.sum() + found.class_attention.sum()
    gradients = torch.autograd.grad(total, (query, key, value), allow_unused=True)
    assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_large_batch_is_worked_off_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU no map is larger than a block, whatever the batch."""
    sizes: list[int] = []
    blocks = attention.probability_blocks

    def watched(*given: Any) -> Iterator[Any]:
        for block in blocks(*given):
            sizes.append(block.probabilities.numel())
            yield block

    monkeypatch.setattr(scored_attention, "probability_blocks", watched)
    query = torch.randn(64, 4, 100, 8, requires_grad=True)
    inputs = attention.AttentionInputs(query, query, query, None, 0.0, False)
    scored_attention.attention_with_statistics(inputs, scored_attention.Asked())
    assert sum(sizes) == 64 * 4 * 100 * 100
    assert max(sizes) <= scored_attention.CPU_BLOCK


@torch.no_grad()
@settings(deadline=None)
@given(SIZES)
def test_maps_in_shared_memory_give_the_same(drawn: dict[str, int | str]) -> None:
    """Sample by sample, and head by head where the map is large."""
    batch, heads, tokens = drawn["batch"], drawn["heads"], drawn["tokens"]
    torch.manual_seed(drawn["seed"])
    # As a projection to queries, keys and values gives them: not contiguous.
    query, key, value = torch.randn(batch, tokens, 3, heads, 4).permute(2, 0, 3, 1, 4)
    rows, counted = queries_that_count(drawn)
    slot = torch.randint(tokens + 1, (batch,))  # one that is not there, too
    inputs = attention.AttentionInputs(query, key, value, None, 0.0, False, scale=0.7)
    wanted, expected = scored_attention.attention_with_statistics(
        inputs, scored_attention.Asked(counted=rows, class_slot=slot)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored_attention, "WHOLE_MAP", drawn["whole"])
        patch.setattr(scored_attention, "SMALL_MAP", 0)
        output, found = scored_attention.attention_with_statistics(
            inputs, scored_attention.Asked(counted=counted, class_slot=slot)
        )
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(found.received, expected.received)
    torch.testing.assert_close(found.class_attention, expected.class_attention)


@settings(deadline=None)
@given(SIZES, st.integers(1, 12))
def test_statistics_from_some_queries(drawn: dict[str, int | str], queries: int) -> None:
    """Output and class attention are those of the whole map; what tokens receive comes from evenly spaced queries."""
    batch, heads, tokens, kind = drawn["batch"], drawn["heads"], drawn["tokens"], drawn["mask"]
    torch.manual_seed(drawn["seed"])
    query, key, value = (torch.randn(batch, heads, tokens, 4, dtype=torch.double) for _ in range(3))
    mask, causal = mask_of(kind.removesuffix(", causal"), batch, heads, tokens), "causal" in kind
    rows, counted = queries_that_count(drawn)
    slot: int | Tensor = torch.randint(-1, tokens, (batch,)) if drawn["seed"] % 2 else drawn["seed"] % (tokens + 1) - 1
    asked = scored_attention.Asked(counted=counted, class_slot=slot, queries=queries)
    inputs = attention.AttentionInputs(query, key, value, mask, 0.0, causal)
    wanted, whole = scored_attention.attention_with_statistics(inputs, asked)
    output, found = sampled_scores.attention_with_sampled_statistics(inputs, asked)
    torch.testing.assert_close(output, wanted, equal_nan=True)
    torch.testing.assert_close(found.class_attention, whole.class_attention, equal_nan=True)
    if queries >= tokens:
        torch.testing.assert_close(found.received, whole.received)
        return
    visible = torch.ones(batch, heads, tokens, tokens, dtype=torch.bool)
    added = torch.zeros(batch, heads, tokens, tokens, dtype=torch.double)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        added = added + mask
        visible = visible & (added > attention.HIDDEN)
    seen = visible.any(2).any(1)
    if causal:
        visible = visible & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = (query @ key.transpose(2, 3) / 2 + added).masked_fill(~visible, -torch.inf)
    strongest = scores.softmax(-1).nan_to_num(0.0).amax(1)
    for sample in range(batch):
        shown = (seen[sample] & (rows[sample] > 0)).nonzero().flatten().tolist()
        asked = sorted(
            {shown[(2 * part + 1) * len(shown) // (2 * queries)] for part in range(queries)} if shown else ()
        )
        wanted = (strongest[sample, asked] * rows[sample, asked].unsqueeze(1)).sum(0)
        torch.testing.assert_close(found.received[sample], wanted)


@settings(deadline=None)
@given(SIZES)
def test_what_nobody_asks_for_leaves_the_fused_attention_alone(drawn: dict[str, int | str]) -> None:
    batch, heads, tokens = drawn["batch"], drawn["heads"], drawn["tokens"]
    torch.manual_seed(drawn["seed"])
    query, key, value = (torch.randn(batch, heads, tokens, 4) for _ in range(3))
    inputs = attention.AttentionInputs(query, key, value, None, 0.0, False)
    _, whole = scored_attention.attention_with_statistics(inputs, scored_attention.Asked(class_slot=0))
    wanted = F.scaled_dot_product_attention(query, key, value)
    for slot in (None, 0):
        asked = scored_attention.Asked(class_slot=slot, received=False)
        output, found = sampled_scores.attention_with_sampled_statistics(inputs, asked)
        assert torch.equal(output, wanted)
        assert found.received is None
        if slot is None:
            assert found.class_attention is None
        else:
            torch.testing.assert_close(found.class_attention, whole.class_attention)


def test_sampled_queries_of_one_sample_are_those_of_a_batch() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 11, 4) for _ in range(3))
    rows = torch.rand(1, 11) > 0.3
    inputs = attention.AttentionInputs(query, key, value, None, 0.0, False)
    asked = scored_attention.Asked(counted=rows, class_slot=3, queries=4)
    _, batch = sampled_scores.attention_with_sampled_statistics(inputs, asked)
    one = replace(inputs, query=query / 2, scale=1.0)
    _, received, seen = sampled_scores.observe_sample(one, replace(asked, counted=rows[0]))
    torch.testing.assert_close(received, batch.received[0])
    torch.testing.assert_close(seen, batch.class_attention[0])
