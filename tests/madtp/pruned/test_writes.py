"""What a model writes, to whom gradients go, and what it draws are the original's, whatever call came first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from joint_stream_models import Encoder, Patches
from model_case import WIDTH, lively
from rewritten_models import gap
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import madtp

CONFIG = madtp.PruningConfig(alignment_tokens=4)


class Host(nn.Module):
    """A tower with something on top of it."""

    def __init__(self, top: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.encoder, self.head = Patches(), Encoder(2), nn.Linear(WIDTH, 3)
        self.twin, self.top = nn.Linear(WIDTH, 3), top
        self.register_buffer("count", torch.zeros(()))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.top(self, self.encoder(self.patches(pixels))[:, 0], pixels)


def taught(model: Any, x: Tensor, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        target = model.twin(x)
    return model.head(x) - target


def averaged(model: Any, x: Tensor, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        model.twin.weight.mul_(0.9).add_(model.head.weight, alpha=0.1)
        model.count.mul_(0.5).add_(x.mean())
    return model.head(x) + model.twin(x) + model.count


def counted(model: Any, x: Tensor, pixels: Tensor) -> Tensor:
    model.count += 1
    if pixels.mean() > 0:
        x = x * 2
    return model.head(x) * model.count


def gradients(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(pixels).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.startswith("madtp")}


def compare(model: nn.Module, pruned: madtp.PrunedModel, pixels: Tensor) -> None:
    with pruned.dense():
        own, its = gradients(model, pixels), gradients(pruned, pixels)
    assert own.keys() == its.keys()
    assert all(gap(own[name], its[name]) < 1e-4 for name in own)
    assert gap(model.count, pruned.count) < 1e-5
    torch.testing.assert_close(pruned.twin.weight, model.twin.weight)


@pytest.mark.parametrize("first", ["a rewrite", "a call"])
def test_code_without_gradients_stays_so_where_the_first_call_had_none(first: str) -> None:
    torch.manual_seed(0)
    model, pixels = lively(Host(taught)), torch.randn(3, 3, 32, 32)
    own = copy.deepcopy(model)
    with torch.set_grad_enabled(first != "a rewrite"):
        pruned = madtp.rewrite(model, (pixels,), config=CONFIG)
    own.train()
    pruned.train()
    if first == "a call":
        with torch.no_grad():
            pruned(pixels)
    compare(own, pruned, pixels)
    assert not pruned.report.notes


@pytest.mark.parametrize("training", [False, True])
def test_several_writes_in_a_row_are_all_made(training: bool) -> None:
    torch.manual_seed(0)
    model, pixels = lively(Host(averaged)), torch.randn(3, 3, 32, 32)
    own = copy.deepcopy(model).train(training)
    pruned = madtp.rewrite(model, (pixels,), config=CONFIG)
    pruned.train(training)
    for _ in range(2):
        compare(own, pruned, pixels)
    assert not pruned.report.unpruned


@torch.no_grad()
def test_a_program_for_another_branch_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, pixels = lively(Host(counted)), torch.rand(3, 3, 32, 32)
    own = copy.deepcopy(model)
    pruned = madtp.rewrite(model, (pixels,), config=CONFIG)
    for given in (pixels, -pixels, pixels, -pixels):
        with pruned.dense():
            assert gap(own(given), pruned(given)) < 1e-5
    assert float(pruned.count) == 4


class Growing(nn.Module):
    """Makes its table larger for more patches."""

    def __init__(self) -> None:
        super().__init__()
        self.vit: Any = vit_of(3)
        self.register_buffer("table", waves(64), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.vit.patch_embed(pixels)
        if x.shape[1] > len(self.table):
            self.table = waves(x.shape[1])
        return self.vit.head(self.vit.norm(self.vit.blocks(x + self.table[: x.shape[1]])).mean(1))


def waves(count: int) -> Tensor:
    return torch.outer(torch.arange(count).float(), torch.linspace(0.1, 1, 32)).sin()


def vit_of(depth: int) -> Any:
    return VisionTransformer(img_size=64, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=5)


@torch.no_grad()
def test_a_buffer_that_forward_enlarges() -> None:
    torch.manual_seed(0)
    model = Growing().eval()
    model.vit.patch_embed.strict_img_size = False
    own = copy.deepcopy(model)
    pruned = madtp.rewrite(model, (torch.randn(2, 3, 64, 64),), config=CONFIG)
    for size in (64, 96, 64, 96):
        pixels = torch.randn(2, 3, size, size)
        assert pruned(pixels).shape == (2, 5)
        with pruned.dense():
            assert gap(own(pixels), pruned(pixels)) < 1e-5
    assert len(model.table) == 64


class Pair(nn.Module):
    """Compares the tokens of two images; masks say which patches of each count."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder = Patches(), Encoder(2)

    def forward(self, pixels: Tensor, first: Tensor, second: Tensor) -> Tensor:
        x = self.encoder(self.patches(pixels))
        return (x * first[..., None]).sum(1) - 2 * (x * second[..., None]).sum(1)


def test_a_tensor_that_is_given_twice_is_two_inputs_later() -> None:
    torch.manual_seed(0)
    model, pixels = lively(Pair()), torch.randn(3, 3, 32, 32)
    mask, other = torch.rand(3, 17), torch.rand(3, 17)
    pruned = madtp.rewrite(model, (pixels, mask, mask), config=CONFIG)
    with pruned.dense():
        for masks in ((mask, mask), (mask, other), (other, mask)):
            assert gap(model(pixels, *masks), pruned(pixels, *masks)) < 1e-5
    assert not any("gradients" in note for note in pruned.report.notes)


class Balancing(nn.Module):
    """A block inside the encoder keeps a loss of its own, which the host adds in training."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder, self.head = Patches(), Encoder(2), nn.Linear(WIDTH, 3)
        self.encoder.norm.register_forward_hook(self.keep)
        self.kept = torch.zeros(())

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output.square().mean()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.encoder(self.patches(pixels))[:, 0]
        scale = 2.0 if float(x.detach().sum()) > 1e9 else 1.0
        return self.head(x * scale) + (self.kept if self.training else 0)


def test_values_are_compared_in_training_too() -> None:
    torch.manual_seed(0)
    model, pixels = lively(Balancing()), torch.randn(3, 3, 32, 32)
    own = copy.deepcopy(model).train()
    pruned = madtp.rewrite(model, (pixels,), config=CONFIG)
    pruned.train()
    with pruned.dense():
        assert gap(own(pixels), pruned(pixels)) < 1e-5
