"""Attention that is called for one window after the other becomes one attention with windows, or is left alone in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from grid_models import (
    HEADS,
    WIDTH,
    Global,
    GridNet,
    assert_dense_is_original,
    assert_samples_ignore_batch_mates,
    copied,
    pixels,
    rewritten,
    survivors,
)
from model_case import DEPTH, lively
from rewritten_models import eager_arithmetic, gap, gradients
from torch import Tensor, nn

import madtp
from madtp.tokens.attention import attention

WINDOWS = (8, 14, 2, 12)
Heads = tuple[Tensor, Tensor, Tensor]
Spelling = Callable[[Heads, Sequence[Tensor | None]], Tensor]
"""From queries, keys and values [B, N, H, D], and masks of the windows, to the output [B, N, C]."""


def attend(one: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(*one, None if mask is None else mask[:, None, None, :])


def cut_heads(heads: Heads, masks: Sequence[Tensor | None]) -> Tensor:
    parts = zip(*(x.transpose(1, 2).split(WINDOWS, 2) for x in heads), strict=True)
    outputs = [attend(*both).transpose(1, 2) for both in zip(parts, masks, strict=True)]
    return torch.cat(outputs, 1).flatten(2)


def cut_tokens(heads: Heads, masks: Sequence[Tensor | None]) -> Tensor:
    parts = zip(*(x.split(WINDOWS, 1) for x in heads), strict=True)
    outputs = [attend([x.transpose(1, 2) for x in one], mask) for one, mask in zip(parts, masks, strict=True)]
    return torch.cat([x.transpose(1, 2).reshape(len(x), -1, WIDTH) for x in outputs], 1)


def slices(heads: Heads, masks: Sequence[Tensor | None]) -> Tensor:
    outputs, start = [], 0
    for length, mask in zip(WINDOWS, masks, strict=True):
        one = [x[:, start : start + length].permute(0, 2, 1, 3).contiguous() for x in heads]
        outputs.append(attend(one, mask))
        start += length
    return torch.cat(outputs, -2).transpose(1, 2).flatten(2)


def in_another_order(heads: Heads, masks: Sequence[Tensor | None]) -> Tensor:
    parts = [*zip(*(x.transpose(1, 2).split(9, 2) for x in heads), strict=True)]
    return torch.cat([attend(one, None) for one in parts[::-1]], 2).transpose(1, 2).flatten(2)


def keys_of_the_next(heads: Heads, masks: Sequence[Tensor | None]) -> Tensor:
    queries, keys, values = (x.transpose(1, 2).split(9, 2) for x in heads)
    parts = zip(queries, keys[1:] + keys[:1], values[1:] + values[:1], strict=True)
    return torch.cat([attend(one, None) for one in parts], 2).transpose(1, 2).flatten(2)


def causal(heads: Heads, masks: Sequence[Tensor | None]) -> Tensor:
    parts = zip(*(x.transpose(1, 2).split(9, 2) for x in heads), strict=True)
    outputs = [F.scaled_dot_product_attention(*one, is_causal=True) for one in parts]
    return torch.cat(outputs, 2).transpose(1, 2).flatten(2)


class Calls(Global):
    """Attention in windows of consecutive tokens."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, HEADS, -1)).unbind(2)
        shown = [None] * len(WINDOWS) if alive is None else alive.split(WINDOWS, 1)
        # A window without tokens has no output that matters.
        masks = [None if one is None else one | ~one.any(1, keepdim=True) for one in shown]
        return self.out(self.spelling(heads, masks))


def drawn(spelling: Spelling, blocks: slice = slice(None)) -> nn.Module:
    torch.manual_seed(0)
    model = GridNet("global")
    for block in model.blocks[blocks]:
        block.attention = Calls(spelling)
    return lively(model)


@cache
def made(spelling: Spelling) -> tuple[nn.Module, madtp.PrunedModel]:
    """A model and what becomes of it; tests that change the latter take a copy."""
    model = drawn(spelling)
    return model, rewritten(model)


@pytest.mark.parametrize("spelling", [cut_heads, cut_tokens, slices])
@torch.no_grad()
def test_calls_for_each_window_are_one_attention(spelling: Spelling) -> None:
    model, pruned = made(spelling)
    assert [s.name for s in pruned.report.sites] == [f"blocks.{n}" for n in range(DEPTH)]
    assert not pruned.report.refusals
    assert not pruned.report.notes
    assert_dense_is_original(model, pruned, (1, 4))
    assert_samples_ignore_batch_mates(pruned)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("batching", ["ragged", "uniform"])
@torch.no_grad()
def test_survivors_attend_within_their_windows(batching: str, batch: int) -> None:
    model, pruned = made(cut_heads)
    pruned = copied(pruned, merge=False, batching=batching)
    given, kept = pixels(batch), survivors(batch, 36, DEPTH, 0)
    kept = [one & (torch.arange(36) // 8 != 1) for one in kept]  # most of a window, and nearly all of the next
    pruned.madtp.control.forced = {f"blocks.{n}": one for n, one in enumerate(kept)}
    with eager_arithmetic():
        found = pruned(pixels=given)
    for key, value in model(given, kept).items():
        assert gap(value, found[key]) < 1e-5, key
    assert pruned.macs_by_module()["blocks.1.attention.qkv"] < 0.8 * 36 * 3 * WIDTH * WIDTH


@torch.no_grad()
def test_every_query_of_a_window_is_asked_whatever_form_the_survivors_have() -> None:
    given, counts = pixels(1), []  # a sample alone keeps as many tokens padded
    for settings in ({}, {"batching": "uniform"}, {"score_queries": 4}):
        pruned = copied(made(cut_heads)[1], **settings)
        pruned(pixels=given)
        counts.append({name: count.tolist() for name, count in pruned.token_counts().items()})
    assert counts[0] == counts[1] == counts[2]


@torch.no_grad()
def test_attention_in_windows_costs_what_it_does_in_the_original() -> None:
    pruned = made(cut_heads)[1]
    with pruned.dense():
        pruned(pixels=pixels(2))
        own = pruned.macs_by_module()["blocks.0.attention"]
    assert own == pytest.approx(2 * WIDTH * sum(length**2 for length in WINDOWS))


def test_every_parameter_and_the_alignment_tokens_learn() -> None:
    pruned = copied(made(cut_tokens)[1]).train()
    given = pixels(3)
    found = gradients(pruned, lambda: pruned(pixels=given))
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert found["madtp.alignment.tokens"].abs().sum() > 0
    assert {n for n, _ in pruned.named_parameters() if not n.startswith("madtp.")} <= found.keys()


@torch.no_grad()
def test_frozen_counts_and_an_export_keep_windows() -> None:
    pruned = copied(made(cut_heads)[1])
    given = pixels(2)
    madtp.freeze(pruned, [{"pixels": given}])
    with eager_arithmetic():
        wanted = pruned(pixels=given)
        exported = torch.export.export(pruned, (), {"pixels": given}).module()(pixels=given)
    for key, value in wanted.items():
        assert gap(value, exported[key]) < 1e-5, key


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (in_another_order, "not all parts of one tensor in their order"),
        (keys_of_the_next, "not all parts of one tensor in their order"),
        (causal, "have masks"),
    ],
)
@torch.no_grad()
def test_near_misses_keep_their_calls_and_are_told(spelling: Spelling, reason: str) -> None:
    model = drawn(spelling, slice(0, 1))
    pruned = rewritten(model)
    (refused,) = pruned.report.refusals
    assert refused.block == "blocks.0.attention"
    assert "windows of 9 of its 36 tokens" in refused.reason
    assert reason in refused.reason
    assert [s.name for s in pruned.report.sites] == [f"blocks.{n}" for n in range(1, DEPTH)]
    assert_dense_is_original(model, pruned, (1, 4))
    assert_samples_ignore_batch_mates(pruned)


@torch.no_grad()
def test_all_tokens_in_windows_are_each_window_alone() -> None:
    query, key, value = torch.randn(3, 2, HEADS, 36, 4).unbind(0)
    parts = zip(*(x.split(WINDOWS, 2) for x in (query, key, value)), strict=True)
    wanted = torch.cat([F.scaled_dot_product_attention(*one) for one in parts], 2)
    assert gap(wanted, attention(query, key, value, windows=WINDOWS)) < 1e-6
    everything = torch.ones(1, 1, 36, 36, dtype=torch.bool)
    assert gap(wanted, attention(query, key, value, everything, windows=WINDOWS)) < 1e-6
