"""Numbers of Python that forward counts: a pruned model computes with them as the original does, or not at all."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_vit import images, vit
from torch import Tensor, nn

import madtp

CONFIG = madtp.PruningConfig(alignment_tokens=8)


class Counts(nn.Module):
    """Scales its result by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tower: Any = vit(2)
        self.calls = 0

    def next(self) -> float:
        self.calls += 1
        return 1 + self.calls / 10

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels) * self.next()


class CountsInObject(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(calls=0)

    def next(self) -> float:
        self.config.calls += 1
        return 1 + self.config.calls / 10


class CountsForPeople(Counts):
    def next(self) -> float:
        self.calls += 1
        return 2.0


@torch.no_grad()
@pytest.mark.parametrize("host", [Counts, CountsInObject])
def test_what_is_computed_with_a_count_follows_it(host: type[Counts]) -> None:
    model = host().eval()
    own = copy.deepcopy(model)
    pruned = madtp.rewrite(model, (images(2, 0),), config=CONFIG)
    assert pruned.report.capture == "regions"
    assert [site.name for site in pruned.report.sites] == ["tower.blocks.0", "tower.blocks.1"]
    assert any("computes with it" in refusal.reason for refusal in pruned.report.refusals)
    batch = images(2, 1)
    found, wanted = [], []
    for _ in range(4):
        with pruned.dense():
            found.append(pruned(batch))
        wanted.append(own(batch))
    ratio = [float((one / found[0]).mean()) for one in found[1:]]
    assert ratio == pytest.approx([float((one / wanted[0]).mean()) for one in wanted[1:]], rel=1e-3)
    assert ratio != pytest.approx([1.0] * 3, rel=1e-3)


@torch.no_grad()
def test_what_is_counted_for_people_changes_nothing() -> None:
    pruned = madtp.rewrite(CountsForPeople().eval(), (images(2, 0),), config=CONFIG)
    assert pruned.report.capture == "whole"
    assert not pruned.report.notes
