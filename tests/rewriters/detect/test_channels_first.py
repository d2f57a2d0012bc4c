"""Residual streams [B, C, N]: projections by convolutions of one token's width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp import PruningConfig

WIDTH, HEADS, LENGTH = 8, 2, 9


class Layer(nn.Module):
    """A post-norm block over [B, C, N]; ``kernel``: tokens that the last projection sees."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out, self.up = (nn.Conv1d(WIDTH, WIDTH, 1, groups=2) for _ in range(5))
        self.down = nn.Conv1d(WIDTH, WIDTH, kernel, padding=kernel // 2)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = (len(x), HEADS, WIDTH // HEADS, -1)
        q, k, v = (f(x).view(heads) for f in (self.query, self.key, self.value))
        hide = torch.where(mask, 0.0, -1e4)[:, None, None, :]
        weights = (q.permute(0, 1, 3, 2) @ k / 2 + hide).softmax(-1)
        x = x + self.out((weights @ v.permute(0, 1, 3, 2)).permute(0, 1, 3, 2).reshape(x.shape))
        x = self.norm1(x.permute(0, 2, 1)).permute(0, 2, 1)
        return self.norm2((x + self.down(F.gelu(self.up(x)))).permute(0, 2, 1)).permute(0, 2, 1)


class ChannelsFirst(nn.Module):
    """Two blocks; returns the first token, or (``every``) all of them."""

    def __init__(self, kernel: int = 1, every: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kernel) for _ in range(2))
        self.every = every

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.permute(0, 2, 1)
        for layer in self.layers:
            x = layer(x, mask)
        x = x.permute(0, 2, 1)
        return x if self.every else x[:, 0]


def inputs(batch: int) -> dict[str, Any]:
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH - row % 3 for row in range(batch)])[:, None]
    return {"x": torch.randn(batch, LENGTH, WIDTH), "mask": mask}


@pytest.mark.parametrize("every", [False, True])
@torch.no_grad()
def test_tokens_in_the_last_dimension_are_pruned(every: bool) -> None:
    torch.manual_seed(0)
    model = ChannelsFirst(every=every).eval()
    pruned = madtp.rewrite(model, inputs(3), config=PruningConfig(gain=4.0))
    assert [s.tokens for s in pruned.report.sites] == [LENGTH] * 2
    assert [s.width for s in pruned.report.sites] == [WIDTH] * 2
    call = inputs(4)
    assert pruned(**call).shape == model(**call).shape
    assert int(pruned.token_counts()["layers.1"].max()) < LENGTH
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5


@torch.no_grad()
def test_a_convolution_over_neighbours_runs_on_every_position() -> None:
    torch.manual_seed(0)
    model = ChannelsFirst(kernel=3).eval()
    pruned = madtp.rewrite(model, inputs(3), config=PruningConfig(gain=4.0))
    assert [s.name for s in pruned.report.sites] == ["layers.0", "layers.1"]
    assert not pruned.report.refusals
    call = inputs(4)
    together = pruned(**call)
    for row in range(4):
        assert gap(together[row : row + 1], pruned(**{n: v[row : row + 1] for n, v in call.items()})) < 1e-5
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5
