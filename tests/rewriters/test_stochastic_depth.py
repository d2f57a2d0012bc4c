"""Blocks that are left out at random in training, as their authors spell it: every block is pruned all the same."""

from __future__ import annotations

import pytest
import torch
from model_case import WIDTH
from rewritten_models import gap
from torch import Tensor, nn

import madtp

DEPTH, KEEP = 2, 0.7

# How the factor of each sample is drawn; ``x`` is what a layer adds to the stream, ``[B, N, C]``.
DRAWS = {
    "bernoulli_": lambda x: x.new_empty(x.shape[0], 1, 1).bernoulli_(KEEP).div_(KEEP),
    "rand and floor": lambda x: (KEEP + torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device)).floor() / KEEP,
    "floor_": lambda x: (KEEP + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1))).floor_().div(KEEP),
    "bernoulli of a full tensor": lambda x: torch.bernoulli(torch.full((x.shape[0], 1, 1), KEEP)) / KEEP,
    "uniform_ below": lambda x: (x.new_zeros(x.shape[0], 1, 1).uniform_() < KEEP).to(x.dtype) / KEEP,
    "dropout of ones": lambda x: nn.functional.dropout(x.new_ones(x.shape[0], 1, 1), 1 - KEEP, training=True),
    # Near misses: a factor for each token, and one for each entry.
    "of each token": lambda x: x.new_empty(x.shape[0], x.shape[1], 1).bernoulli_(KEEP),
    "of each token, uniform": lambda x: torch.empty_like(x[:, :, :1]).uniform_(),
    "of each token, filled": lambda x: torch.empty_like(x[:, :, :1]).fill_(0.5),
    "of each token, normal": lambda x: torch.empty_like(x[:, :, :1]).normal_(),
    "of each token, exponential": lambda x: torch.empty_like(x[:, :, :1]).exponential_(),
    "of each entry": lambda x: torch.empty_like(x).bernoulli_(KEEP),
    "noise": lambda x: 1 + 0.1 * torch.randn_like(x),
}


class DeepBlock(nn.Module):
    """A pre-norm block; the factor is drawn in training."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.draw = draw
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def left_out(self, x: Tensor) -> Tensor:
        return x * DRAWS[self.draw](x) if self.training else x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.left_out(self.out(y))
        return x + self.left_out(self.mlp(self.norm2(x)))


class Deep(nn.Module):
    def __init__(self, draw: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(DeepBlock(draw) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x.mean(1))
        return found


@pytest.mark.parametrize(("draw", "trains_first"), [("bernoulli_", False), *((draw, True) for draw in DRAWS)])
def test_every_block_is_pruned_in_training_and_evaluation(draw: str, trains_first: bool) -> None:
    model, pixels = Deep(draw), torch.randn(4, 3, 64, 64)
    model.train(trains_first)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=8))
    assert not pruned.report.refusals
    for training in (not trains_first, trains_first):
        model.train(training)
        pruned.train(training)
        with pruned.dense():  # the same draws in the same order
            torch.manual_seed(1)
            found = pruned(pixels)
        torch.manual_seed(1)
        assert gap(model(pixels), found) < 1e-5
        output = pruned(pixels)
        assert bool(output.isfinite().all())
        assert all(int(counts.min()) < 64 for counts in pruned.token_counts().values())
        assert set(pruned.token_counts()) == {f"blocks.{layer}" for layer in range(DEPTH)}
        output.sum().backward()
        assert all(parameter.grad is not None for parameter in pruned.blocks.parameters())
