"""Attributes, configurations and modules that change after the rewrite are followed, or the report says so."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_vit import images, rewritten, vit
from torch import Tensor, nn

import madtp
from madtp import PrunedModel

BATCH = images(2, 0)
CONFIG = madtp.PruningConfig(alignment_tokens=4)


class Switched(nn.Module):
    """Asks its attributes and its configuration what to compute, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.scale, self.calls = vit(1), 1.0, 0
        self.config = SimpleNamespace(all_tokens=False)

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.calls += 1
        tokens: Any = self.tower.forward_features(pixels)
        pooled = self.tower.forward_head(tokens) * self.scale
        return (pooled, tokens) if self.config.all_tokens else pooled


@pytest.fixture
def models() -> tuple[Switched, PrunedModel]:
    model = Switched().eval()
    return model, madtp.rewrite(model, (BATCH,), config=CONFIG)


@torch.no_grad()
def test_switches_are_followed(models: tuple[Switched, PrunedModel]) -> None:
    model, pruned = models
    before = pruned(BATCH)
    pruned.scale = 3.0
    torch.testing.assert_close(pruned(BATCH), before * 3)
    model.scale = 3.0
    pruned.config.all_tokens = True
    with pruned.madtp.dense():
        torch.testing.assert_close(pruned(BATCH), model(BATCH))
    pruned.config.all_tokens = False
    torch.testing.assert_close(pruned(BATCH), before * 3)


@torch.no_grad()
def test_changes_that_do_not_matter_are_found_out(models: tuple[Switched, PrunedModel]) -> None:
    _, pruned = models
    pruned(BATCH)
    serials = []
    for calls in range(6):
        pruned.calls = 10 + calls
        pruned(BATCH)
        serials.append(pruned.madtp.programs)
    assert serials[2:] == serials[2:3] * 4, "after three values it is known that a counter does not matter"
    pruned.scale = 3.0
    pruned(BATCH)
    assert pruned.madtp.programs == serials[-1] + 1


def test_what_makes_no_difference_in_one_mode_may_in_another() -> None:
    model = vit(1)
    attention = model.get_submodule("blocks.0.attn")
    pruned = madtp.rewrite(model.train(), (BATCH,), config=CONFIG)
    own = pruned.get_submodule("blocks.0.attn")
    for mode in (True, False, True):
        pruned.train(mode)
        own.attn_drop.p = attention.attn_drop.p = 1.0 if not mode else own.attn_drop.p
        pruned(BATCH)
    with torch.no_grad(), pruned.dense():
        torch.testing.assert_close(pruned(BATCH), model.train()(BATCH))


@torch.no_grad()
def test_other_objects_in_an_attribute_are_followed() -> None:
    class Acting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.act, self.after = vit(1), torch.sin, nn.LeakyReLU(0.1)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.after(self.act(self.tower(pixels)))

    model = Acting().eval()
    pruned = madtp.rewrite(model, (BATCH,), config=CONFIG)
    for change in (
        lambda one: setattr(one, "act", torch.cos),
        lambda one: setattr(one.after, "negative_slope", 3.0),
        lambda one: setattr(one, "after", nn.LeakyReLU(0.5)),
    ):
        change(model)
        change(pruned)
        with pruned.dense():
            torch.testing.assert_close(pruned(BATCH), model(BATCH))


@torch.no_grad()
def test_another_module_in_the_place_of_one_is_followed() -> None:
    model, pruned = vit(2), rewritten(2)
    for one in (model, pruned):
        one.blocks[1] = nn.Identity()
    with pruned.madtp.dense():
        torch.testing.assert_close(pruned(BATCH), model(BATCH))
    for one in (model, pruned):
        one.head = nn.Sequential(nn.Linear(32, 7, bias=False))
        nn.init.ones_(one.head[0].weight)
    with pruned.madtp.dense():
        torch.testing.assert_close(pruned(BATCH), model(BATCH))


def test_a_copy_follows_its_own_switches(models: tuple[Switched, PrunedModel]) -> None:
    _, pruned = models
    own = copy.deepcopy(pruned)
    own.scale = 2.0
    with torch.no_grad():
        torch.testing.assert_close(own(BATCH), 2 * pruned(BATCH))


@torch.no_grad()
def test_kinds_beyond_the_bound_run_unpruned_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Switched().eval()
    pruned = madtp.rewrite(model, (BATCH,), config=madtp.PruningConfig(alignment_tokens=4, max_programs=2))
    for scale in (2.0, 3.0, 4.0):
        pruned.scale = model.scale = scale
        found = pruned(BATCH)
    torch.testing.assert_close(found, model(BATCH))
    (note,) = pruned.report.unpruned
    assert "max_programs=4" in str(note)
    assert sum("max_programs=4" in record.message for record in caplog.records) == 1
    pruned.scale = 2.0
    pruned(BATCH)
    assert all((kept < 65).any() for kept in pruned.token_counts().values())
