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
def test_changes_that_do_not_matter_capture_once(models: tuple[Switched, PrunedModel]) -> None:
    _, pruned = models
    pruned(BATCH)
    serials = []
    for calls in range(4):
        pruned.calls = 10 + calls
        pruned(BATCH)
        serials.append(pruned.madtp.programs)
    assert serials == serials[:1] * 4
    pruned.scale = 3.0
    pruned(BATCH)
    assert pruned.madtp.programs == serials[0] + 1


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
