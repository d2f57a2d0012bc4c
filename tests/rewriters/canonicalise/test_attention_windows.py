"""Attention of rank 5, with a dimension of windows: [B, H, W, N, D] or [B, W, H, N, D], fused or spelled out."""

from __future__ import annotations

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

FORMS = ["fused", "spelled", "windows first"]


class Units(Global):
    """Attention in windows of every ninth token; ``count`` windows (1: global), ``form``: how it is spelled."""

    def __init__(self, form: str, count: int) -> None:
        super().__init__()
        self.form, self.count = form, count

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        batch = len(x)
        qkv = self.qkv(x).reshape(batch, -1, self.count, 3, HEADS, WIDTH // HEADS)
        first = self.form == "windows first"
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5) if first else qkv.permute(3, 0, 4, 2, 1, 5)
        if alive is not None:
            shown = alive.reshape(batch, -1, self.count).transpose(1, 2)
            shown = shown | ~shown.any(2, keepdim=True)
            shown = shown[:, :, None, None, :] if first else shown[:, None, :, None, :]
            y = F.scaled_dot_product_attention(q, k, v, shown)
        elif self.form == "spelled":
            y = ((q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out((y.permute(0, 3, 1, 2, 4) if first else y.transpose(1, 3)).reshape(x.shape))


def drawn(form: str, count: int) -> nn.Module:
    torch.manual_seed(0)
    model = GridNet("global")
    for block in model.blocks:
        block.attention = Units(form, count)
    return lively(model)


@cache
def made(form: str, count: int) -> tuple[nn.Module, madtp.PrunedModel]:
    """A model and what becomes of it; tests that change the latter take a copy."""
    model = drawn(form, count)
    return model, rewritten(model)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_windows_beside_heads_are_attention_in_windows(form: str, count: int) -> None:
    model, pruned = made(form, count)
    assert [s.name for s in pruned.report.sites] == [f"blocks.{n}" for n in range(DEPTH)]
    assert not pruned.report.refusals
    assert_dense_is_original(model, pruned, (1, 4))
    pruned = copied(pruned, merge=False)
    given, kept = pixels(3), survivors(3, 36, DEPTH, 0)
    pruned.madtp.control.forced = {f"blocks.{n}": one for n, one in enumerate(kept)}
    with eager_arithmetic():
        found = pruned(pixels=given)
    for key, value in model(given, kept).items():
        assert gap(value, found[key]) < 1e-5, key
    macs = pruned.macs_by_module()
    whole = 36 * 3 * WIDTH * WIDTH
    assert macs["blocks.1.mlp.up"] < 0.5 * whole
    # All of a window's tokens stand together; without windows, survivors alone ask and are asked.
    assert (macs["blocks.1.attention.qkv"] < 0.7 * whole) == (count == 1)


@pytest.mark.parametrize("count", [1, 4])
@torch.no_grad()
def test_a_sample_ignores_its_batch_mates(count: int) -> None:
    pruned = made("fused", count)[1]
    assert_samples_ignore_batch_mates(pruned)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_and_the_alignment_tokens_learn(form: str) -> None:
    pruned = copied(made(form, 4)[1]).train()
    given = pixels(3)
    found = gradients(pruned, lambda: pruned(pixels=given))
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert found["madtp.alignment.tokens"].abs().sum() > 0
    assert {n for n, _ in pruned.named_parameters() if not n.startswith("madtp.")} <= found.keys()


class Biased(Units):
    """A bias of each window is added to its scores."""

    def __init__(self, form: str, count: int) -> None:
        super().__init__(form, count)
        self.bias = nn.Parameter(torch.randn(count, 1, 9))

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, self.count, 3, HEADS, WIDTH // HEADS).permute(3, 0, 4, 2, 1, 5)
        y = (q @ k.transpose(-1, -2) * 0.3 + self.bias).softmax(-1) @ v
        return self.out(y.transpose(1, 3).reshape(x.shape))


class Untold(Units):
    """Queries that no view took from channels: nothing tells which dimension holds heads."""

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        q = torch.stack([x.reshape(len(x), -1, self.count, WIDTH).transpose(1, 2)] * HEADS, 1)
        return self.out(F.scaled_dot_product_attention(q, q, q).mean(1).transpose(1, 2).reshape(x.shape))


def with_attention(kind: type[Units]) -> nn.Module:
    model = drawn("fused", 4)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attention = kind("fused", 4)
    return lively(model)


def test_a_bias_of_each_window_is_followed() -> None:
    model = with_attention(Biased)
    pruned = rewritten(model)
    assert_dense_is_original(model, pruned, (1, 3))
    assert_samples_ignore_batch_mates(pruned)
    assert all((kept < 36).all() for kept in pruned.token_counts().values())


def test_a_near_miss_is_refused() -> None:
    with pytest.raises(madtp.MadtpError, match="no place to prune"):
        rewritten(with_attention(Untold))
