"""Autocast that a model switches on inside its forward stays in the graph, wherever it begins and ends."""

from __future__ import annotations

import pytest
import torch
from model_case import lively
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import madtp

PLACES = ("attention", "block", "model")


def lowered(wanted: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted)


class Block(nn.Module):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.feed_forward = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def attend(self, x: Tensor) -> Tensor:
        with lowered(self.place == "attention"):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        with lowered(self.place == "block"):
            x = x + self.attend(self.norms[0](x))
            return x + self.feed_forward(self.norms[1](x))


class Tower(nn.Module):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks, self.head = nn.Sequential(*(Block(place) for _ in range(3))), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        with lowered(self.place == "model"):
            x = self.patches(images).flatten(2).transpose(1, 2)
            x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
            return self.head(x[:, 0])


def built(place: str) -> tuple[nn.Module, madtp.PrunedModel, Tensor]:
    torch.manual_seed(0)
    model, images = lively(Tower(place)), torch.randn(3, 3, 32, 32)
    config = madtp.PruningConfig(temperature=2.0, alignment_tokens=2)
    return model, madtp.rewrite(model, (images[:2],), config=config), images


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(images).float().square().sum().backward()
    return [p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "madtp" not in name]


@pytest.mark.parametrize("place", PLACES)
def test_values_and_gradients_are_the_originals(place: str) -> None:
    model, pruned, images = built(place)
    assert pruned.report.capture == "whole"
    assert len(pruned.report.sites) == 3
    with pruned.dense():
        found, wanted = pruned(images), model(images)
        assert found.dtype == wanted.dtype == (torch.bfloat16 if place == "model" else torch.float32)
        torch.testing.assert_close(found, wanted)
        own, its = gradients(pruned, images), gradients(model, images)
    assert len(own) == len(its)
    for one, other in zip(own, its, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()
    pruned(images)
    assert pruned.macs() < pruned.dense_macs(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_around_the_call_does_not_reach_inside(dtype: torch.dtype) -> None:
    model, pruned, images = built("attention")
    with pruned.dense(), torch.autocast("cpu", dtype=dtype):
        found, wanted = pruned(images), model(images)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert not pruned.report.notes
    assert not pruned.report.unpruned


@torch.no_grad()
def test_double_precision_stays_as_autocast_leaves_it() -> None:
    model, pruned, images = built("attention")
    model, pruned = model.double(), pruned.double()
    with pruned.dense():
        torch.testing.assert_close(pruned(images.double()), model(images.double()))
