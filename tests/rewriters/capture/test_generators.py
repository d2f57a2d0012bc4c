"""Numbers that a model draws by a generator of its own are no constants: what draws them is left to Python, or refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from joint_stream_models import Encoder, Patches
from model_case import WIDTH, lively
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp.errors import CaptureError


class Drawing(nn.Module):
    """Adds noise to what it reads. inner: the tower is a module, so that the rest may stay in Python."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.patches, self.encoder = Patches(), Encoder(2)
        self.inner, self.head = inner, nn.Linear(WIDTH, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels)
        if self.inner:
            x = self.encoder(x)
        else:
            for block in self.encoder.blocks:
                x = block(x)
        generator = torch.Generator().manual_seed(3)
        return self.head(x[:, 0] + torch.randn(WIDTH, generator=generator))


@pytest.mark.parametrize(("inner", "region"), [(True, "encoder"), (False, "encoder.blocks.0 to encoder.blocks.1")])
@torch.no_grad()
def test_what_stands_around_the_draw_is_rewritten(inner: bool, region: str) -> None:
    torch.manual_seed(0)
    model, pixels = lively(Drawing(inner=inner)), torch.randn(3, 3, 32, 32)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=4))
    assert pruned.report.regions == (region,)
    for _ in range(2):
        with pruned.dense():
            assert gap(model(pixels), pruned(pixels)) < 1e-5


class DrawingBetween(Drawing):
    def forward(self, pixels: Tensor) -> Tensor:
        x, generator = self.patches(pixels), torch.Generator().manual_seed(3)
        for block in self.encoder.blocks:
            x = block(x) + torch.randn(WIDTH, generator=generator)
        return self.head(x[:, 0])


def test_a_draw_between_the_blocks_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"torch\.Generator of its own"):
        madtp.rewrite(lively(DrawingBetween(inner=False)), (torch.randn(3, 3, 32, 32),))


@torch.no_grad()
def test_torchs_own_generator_is_followed() -> None:
    class Following(Drawing):
        def forward(self, pixels: Tensor) -> Tensor:
            x = self.encoder(self.patches(pixels))[:, 0]
            return self.head(x + torch.randn_like(x))

    torch.manual_seed(0)
    model, pixels = lively(Following(inner=True)), torch.randn(3, 3, 32, 32)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=4))
    assert pruned.report.capture == "whole"
    with pruned.dense():
        torch.manual_seed(1)
        wanted = model(pixels)
        torch.manual_seed(1)
        assert gap(wanted, pruned(pixels)) < 1e-5


class Varying(Drawing):
    """Scales what it reads by a number that Python draws. inner: the tower is a module."""

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels)
        scale = 1 + random.random() + float(np.random.rand())
        return self.head(self.encoder(x)[:, 0] * scale)


@torch.no_grad()
def test_what_python_or_numpy_draw_is_no_constant() -> None:
    torch.manual_seed(0)
    model, pixels = lively(Varying(inner=True)), torch.randn(3, 3, 32, 32)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=4))
    assert pruned.report.regions == ("encoder",)
    for seed in range(3):
        found = []
        for one in (model, pruned):
            random.seed(seed)
            np.random.seed(seed)
            with pruned.dense():
                found.append(one(pixels))
        assert gap(*found) < 1e-5
