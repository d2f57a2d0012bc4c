"""Autocast that a model switches on inside its forward stays in the graph, wherever it begins and ends."""

from __future__ import annotations

import functools

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
    # Code that switches it off is not followed under it, and a note says so where it matters.
    with torch.autocast("cpu", dtype=dtype):
        pruned(images)
    assert any("nothing is pruned" in note for note in pruned.report.notes)


@torch.no_grad()
def test_double_precision_stays_as_autocast_leaves_it() -> None:
    model, pruned, images = built("attention")
    model, pruned = model.double(), pruned.double()
    with pruned.dense():
        torch.testing.assert_close(pruned(images.double()), model(images.double()))


class Alone(Tower):
    """Autocast around everything, and no block of code that switches it off."""

    def __init__(self) -> None:
        super().__init__("nowhere")
        for block in self.blocks:
            block.attend = functools.partial(by_hand, block)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block.attend(block.norms[0](x))
            x = x + block.feed_forward(block.norms[1](x))
        return self.head(x[:, 0]).float()


class Inside(Alone):
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(images)


def by_hand(block: Block, x: Tensor) -> Tensor:
    """Attention by single operations, which round otherwise than a fused one."""
    q, k, v = block.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    return block.out(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [Alone, Inside])
@pytest.mark.parametrize("outside", [False, True])
def test_outputs_that_were_cast_up_are_compared_as_what_they_were_made_of(kind: type[Tower], outside: bool) -> None:
    torch.manual_seed(0)
    model, images = lively(kind()), torch.randn(3, 3, 32, 32)
    pruned = madtp.rewrite(model, images, config=madtp.PruningConfig(temperature=2.0, alignment_tokens=2))
    pruned.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        pruned(images).square().sum().backward()
    assert len(pruned.token_counts()) == 3
    assert not pruned.report.notes
