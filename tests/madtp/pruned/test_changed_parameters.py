"""Parameters that are tied, untied, frozen or replaced after the rewrite: a pruned model does what the original does then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_vit import images, vit
from torch import Tensor, nn

import madtp


def tied() -> Any:
    model: Any = vit(2)
    model.blocks[1].attn.proj.weight = model.blocks[0].attn.proj.weight
    return model


def untie(model: Any) -> None:
    torch.manual_seed(1)
    model.blocks[1].attn.proj.weight = nn.Parameter(torch.randn(32, 32) / 6)


def untie_the_first(model: Any) -> None:
    torch.manual_seed(1)
    model.blocks[0].attn.proj.weight = nn.Parameter(torch.randn(32, 32) / 6)


def load_untied_weights(model: Any) -> None:
    other = tied()
    untie(other)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True, strict=False)


class Wrapped(nn.Module):
    """Takes the place of a linear layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def wrap_one(model: Any) -> None:
    model.blocks[0].attn.proj = Wrapped(model.blocks[0].attn.proj)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [untie, untie_the_first, load_untied_weights, wrap_one], ids=lambda one: one.__name__
)
def test_tied_weights_that_are_untied_later(change: Callable[[Any], None]) -> None:
    model, reference, batch = tied(), tied(), images(2, 1)
    pruned: Any = madtp.rewrite(model, (images(2, 0),), config=madtp.PruningConfig(alignment_tokens=8))
    for one in (pruned, reference):
        change(one)
    with pruned.dense():
        torch.testing.assert_close(pruned(batch), reference(batch), rtol=1e-4, atol=1e-5)
        for one in (pruned, reference):
            one(batch).square().mean().backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in pruned.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


class StopsAtFrozen(nn.Module):
    """Computes without gradients what wants none."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = vit(2), nn.Linear(5, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.set_grad_enabled(any(p.requires_grad for p in self.tower.parameters())):
            features = self.tower(pixels)
        return self.head(features)


@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_host_that_asks_which_parameters_are_frozen(frozen_first: bool) -> None:
    torch.manual_seed(0)
    model = StopsAtFrozen().eval()
    reference = copy.deepcopy(model)
    model.tower.requires_grad_(not frozen_first)
    pruned: Any = madtp.rewrite(model, (images(2, 0),), config=madtp.PruningConfig(alignment_tokens=8, alignment=False))
    for one in (pruned, reference):
        one.tower.requires_grad_(frozen_first)
        one(images(2, 1)).square().mean().backward()
    assert bool(pruned.madtp.token_counts()["tower.blocks.1"].lt(65).any())
    names = [{name for name, p in one.named_parameters() if p.grad is not None} for one in (pruned, reference)]
    assert names[0] == names[1]
