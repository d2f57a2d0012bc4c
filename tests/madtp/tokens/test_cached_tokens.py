"""What hosts do with cached keys and values gives for survivors alone what it gives for all tokens with the others hidden."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from madtp.errors import ContinuationError
from madtp.tokens.cache_marks import MarkedAxes, without_marked
from madtp.tokens.cached_slots import CachedSlots
from madtp.tokens.cached_tokens import (
    CachedTokens,
    NotFollowed,
    dropped_as_zeros,
    holds_cached_tokens,
    strictly_followed,
)

B, H, N, D = 2, 2, 6, 4
KEPT = torch.tensor([[True, False, True, True, False, True], [False, True, False, True, False, False]])


class Cached(NamedTuple):
    """Cached tokens, all of them and the survivors, and which survive."""

    full: Tensor
    cached: CachedTokens
    kept: Tensor


def slots_of(kept: Tensor) -> CachedSlots:
    counts = kept.sum(1)
    order = kept.int().sort(dim=1, descending=True, stable=True).indices[:, : int(counts.max())]
    valid = torch.arange(order.shape[1]) < counts[:, None]
    return CachedSlots(
        kept.shape[1], order.masked_fill(~valid, 0), order.shape[1], None if bool(valid.all()) else valid
    )


def cache(kept: Tensor = KEPT, slots: CachedSlots | None = None) -> Cached:
    """Keys or values ``[B, H, N, D]``, and later tokens behind them."""
    slots = slots or slots_of(kept)
    full = torch.randn(len(kept), H, kept.shape[1], D)
    survivors = full[torch.arange(len(kept))[:, None], :, slots.index].transpose(1, 2)
    later = torch.randn(len(kept), H, 2, D)
    cached = torch.cat([CachedTokens(survivors, slots, 2, 0), later], dim=-2)
    assert isinstance(cached, CachedTokens)
    return Cached(torch.cat([full, later], 2), cached, F.pad(kept, (0, 2), value=True))


def agree(cached: object, full: Tensor, kept: Tensor, dims: tuple[int, int] = (0, 2)) -> bool:
    """Whether cached tokens are the kept ones of ``full``, and the others are marked."""
    assert isinstance(cached, CachedTokens)
    assert cached.shape == full.shape
    marked, full = (x.movedim(dims, (0, 1)) for x in (cached.marked(), full))
    return bool(torch.allclose(marked[kept], full[kept], atol=1e-6)) and bool(marked[~kept].isnan().all())


SHAPES: list[tuple[Callable[[Tensor], Tensor], tuple[int, int]]] = [
    (lambda x: x.transpose(1, 2), (0, 1)),
    (lambda x: x.transpose(-1, -2), (0, 3)),
    (lambda x: x.mT, (0, 3)),
    (lambda x: x.permute(2, 0, 1, 3), (1, 0)),
    (lambda x: x.unsqueeze(1), (0, 3)),
    (lambda x: x[:, :, None].expand(B, H, 3, N + 2, D).reshape(B, 3 * H, N + 2, D), (0, 2)),
    (lambda x: x.expand(-1, -1, -1, D), (0, 2)),
    (lambda x: x.repeat_interleave(3, dim=1), (0, 2)),
    (lambda x: x.flatten(0, 1).view(B, H, N + 2, D), (0, 2)),
    (lambda x: x.transpose(1, 2).flatten(2), (0, 1)),
    (lambda x: x.to(torch.float64).float().contiguous().clone().detach(), (0, 2)),
    (lambda x: x * 2 - x / 3 + x.shape[2], (0, 2)),
    (lambda x: x + torch.arange(float(N + 2))[:, None], (0, 2)),
    (lambda x: x[:, 1], (0, 1)),
    (lambda x: x[..., 1:3], (0, 2)),
    (lambda x: x.chunk(2, -1)[1], (0, 2)),
    (lambda x: F.linear(x, torch.ones(3, D)), (0, 2)),
    (lambda x: F.layer_norm(x, (D,)), (0, 2)),
    (lambda x: torch.cat([x[..., :1], x[..., 1:]], -1), (0, 2)),
    (lambda x: x.masked_fill(torch.arange(N + 2)[:, None] == 0, 3.0), (0, 2)),
    (lambda x: torch.where(torch.arange(N + 2)[:, None] == 0, x, 2 * x), (0, 2)),
]


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_shapes_and_values(case: int) -> None:
    operation, dims = SHAPES[case]
    full, cached, kept = cache()
    with strictly_followed():
        found = operation(cached)
    assert agree(found, operation(full), kept, dims)


@given(
    kept=st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=3), data=st.data()
)
def test_ranges_of_tokens(kept: list[list[bool]], data: st.DataObject) -> None:
    full, cached, alive = cache(torch.tensor(kept))
    start = data.draw(st.integers(-8, 7))
    stop = data.draw(st.one_of(st.none(), st.integers(-8, 9)))
    with strictly_followed():
        found = cached[:, :, start:stop]
    if full[:, :, start:stop].shape[2]:
        assert agree(found, full[:, :, start:stop], alive[:, start:stop])
        further = torch.randn(len(kept), H, 1, D)
        more = torch.cat([found, further], 2)
        later = F.pad(alive[:, start:stop], (0, 1), value=True)
        assert agree(more, torch.cat([full[:, :, start:stop], further], 2), later)


def test_samples_are_selected_and_repeated() -> None:
    full, cached, kept = cache()
    order = torch.tensor([1, 0, 0])
    with strictly_followed():
        assert agree(cached.index_select(0, order), full[order], kept[order])
        assert agree(cached[order], full[order], kept[order])
        assert agree(cached[order, ...], full[order], kept[order])
        assert agree(cached[1:], full[1:], kept[1:])
        assert agree(cached.narrow(0, 1, 1), full[1:], kept[1:])
        assert agree(cached.narrow(-2, 1, 4), full[:, :, 1:5], kept[:, 1:5])
        assert agree(cached.repeat_interleave(2, dim=0), full.repeat_interleave(2, 0), kept.repeat_interleave(2, 0))


def test_a_window_holds_no_more_than_all_of_its_tokens() -> None:
    kept = torch.rand(3, 80) < 0.7
    full, cached, alive = cache(kept)
    window = 60
    for _ in range(90):
        new = torch.randn(3, H, 1, D)
        full, alive = torch.cat([full, new], 2)[:, :, -window:], F.pad(alive, (0, 1), value=True)[:, -window:]
        with strictly_followed():
            found = torch.cat([cached, new], 2)[:, :, -window:]
        assert isinstance(found, CachedTokens)
        cached = found
        assert agree(cached, full, alive)
        assert cached.slots.count <= window + 16
    assert cached.slots.count == window


def test_one_prompt_is_shared_by_several_continuations() -> None:
    full, cached, kept = cache(KEPT[:1])
    with strictly_followed():
        assert agree(cached.expand(3, -1, -1, -1), full.expand(3, -1, -1, -1), kept.expand(3, -1))
        assert agree(cached.repeat(3, 1, 1, 1), full.repeat(3, 1, 1, 1), kept.repeat(3, 1))
        assert agree(torch.cat([torch.tensor([]), cached], dim=-2), full, kept)
    both = cache()
    assert agree(both.cached.repeat(2, 1, 1, 1), both.full.repeat(2, 1, 1, 1), both.kept.repeat(2, 1))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def spelled_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * D**-0.5
    if mask is not None:
        scores = scores + torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), 0.0) @ value


def with_folded_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, count, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    q, k, v = (x.reshape(batch * heads, -1, D) for x in (query, key, value))
    scores = torch.bmm(q * D**-0.5, k.transpose(1, 2))
    if mask is not None:
        scores = scores.view(batch, heads, count, -1).masked_fill(~mask, float("-inf")).view(scores.shape)
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, count, D)


@pytest.mark.parametrize("form", [attend, spelled_out, with_folded_heads])
@pytest.mark.parametrize("masked", [None, "samples", "queries"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_sees_survivors_alone(form: Callable[..., Tensor], masked: str | None, padded: bool) -> None:
    kept = KEPT if padded else torch.tensor([[True, False, True] * 2, [False, True, True] * 2])
    slots = slots_of(kept)
    assert (slots.valid is not None) == padded
    key, value = cache(kept, slots), cache(kept, slots)
    query, mask = torch.randn(B, 2 * H, 3, D), None
    if masked is not None:
        mask = torch.rand(B, 1, 3 if masked == "queries" else 1, N + 2) < 0.6
        mask[..., -1] = True
    hidden = key.kept[:, None, None]
    wanted = form(query, key.full, value.full, hidden.expand(B, 1, 3, -1) if mask is None else mask & hidden)
    with strictly_followed():
        found = form(query, key.cached, value.cached, mask)
    assert type(found) is Tensor
    assert torch.allclose(found, wanted, atol=1e-5)


def test_causal_attention_counts_positions() -> None:
    key = cache(slots=(slots := slots_of(KEPT)))
    value = cache(slots=slots)
    query = torch.randn(B, H, N + 2, D)
    causal = torch.ones(N + 2, N + 2, dtype=torch.bool).tril() & key.kept[:, None, None]
    causal[..., 0] = True  # rows that see nothing are of no interest
    rows = slice(3, None)
    wanted = F.scaled_dot_product_attention(query, key.full, value.full, causal & key.kept[:, None, None])
    found = F.scaled_dot_product_attention(query, key.cached, value.cached, is_causal=True)
    assert torch.allclose(found[:, :, rows], wanted[:, :, rows], atol=1e-5)


def test_what_is_not_followed_is_an_error() -> None:
    full, cached, kept = cache()
    operations: list[Callable[[Tensor], object]] = [
        lambda x: x.mean(2),
        lambda x: x.flip(2),
        lambda x: x.sum(),
        lambda x: x[:, :, ::2],
        lambda x: x[:, :, :5] + x[:, :, 3:],
        lambda x: x - x[torch.tensor([1, 0])],
        lambda x: torch.cat([torch.zeros(B, H, 1, D), x], 2),
        lambda x: x.repeat(1, 1, 2, 1),
        lambda x: torch.add(input=x, other=x),
        lambda x: x.masked_fill(mask=torch.ones(N + 2, 1, dtype=torch.bool), value=0.0),
        lambda x: x.clamp(min=torch.zeros(N + 2, 1)),
        lambda x: x.zero_(),
        lambda x: x.copy_(x),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x + cache().cached,
    ]
    for operation in operations:
        with pytest.raises(ContinuationError, match="reads keys or values in a cache"):
            operation(cached)
        with strictly_followed(), pytest.raises(NotFollowed):
            operation(cached)
    assert agree(cached, full, kept)
    with dropped_as_zeros():
        torch.testing.assert_close(cached.sum(), full.masked_fill(~kept[:, None, :, None], 0).sum())


def test_slots_are_found_again_by_their_marks() -> None:
    full, cached, kept = cache()
    again = without_marked(cached.marked(), MarkedAxes(0, 2, "tokens"))
    assert agree(again, full, kept)
    assert isinstance(again, CachedTokens)
    assert again.slots.count == 6
    assert without_marked(full, MarkedAxes(0, 2, "tokens")) is full


def test_weights_of_an_attention_have_an_entry_for_each_token() -> None:
    key = cache()
    scores = torch.randn(B, H, 3, D) @ key.cached.mT
    assert isinstance(scores, CachedTokens)
    weights = F.dropout(scores.softmax(-1).to(torch.float64), 0.0)
    assert isinstance(weights, CachedTokens)
    assert weights.weights
    assert not scores.weights
    full = weights.full_weights()
    assert bool((full.sum(-1) - 1).abs().max() < 1e-6)
    assert bool((full[~key.kept[:, None, None].expand(full.shape)] == 0).all())


def test_in_place_operations_on_scores_write_to_them() -> None:
    full, cached, kept = cache()
    scores, wanted = cached.clone(), full.clone()
    held = scores
    scores += torch.arange(float(N + 2))[:, None]
    scores.mul_(2)
    wanted = (wanted + torch.arange(float(N + 2))[:, None]) * 2
    assert scores is held
    assert agree(scores, wanted, kept)
    assert agree(cached, full, kept)


def test_copies_and_size() -> None:
    full, cached, kept = cache()
    both = copy.deepcopy([cached, cached])
    assert both[0] is both[1] is not cached
    assert agree(both[0], full, kept)
    assert agree(pickle.loads(pickle.dumps(cached)), full, kept)
    assert cached.bytes() < full.numel() * 4
    assert cached.nbytes == cached.survivors.nbytes
    assert "slots=6" in repr(cached)
    assert holds_cached_tokens({"layers": [(cached,)]})
    assert not holds_cached_tokens({"layers": [(full,)]})
