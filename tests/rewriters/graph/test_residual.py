"""Residual connections that are no plain addition: recognised in every spelling, at their place, and pruned correctly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_spellings import LENGTH, WIDTH, Block, Speller, sdpa, spelled_case
from masked_oracle import expected, survivors
from model_case import Case, lively
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp import PruningConfig
from madtp.errors import NoSiteError

pytestmark = pytest.mark.usefixtures("plain_attention")
Join = Callable[[Tensor, Tensor, Tensor], Tensor]


def copied_and_added_in_place(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    z = x.clone()
    z += y
    return z


def filled_by_half(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    z = x.contiguous().clone()
    return z.mul_(0.5).add_(y, alpha=2.0)


# What x, f(x) and a weight for each channel become.
JOINS: dict[str, Join] = {
    "times a number": lambda x, y, w: x * 0.8 + y,
    "behind, times a number": lambda x, y, w: y + 0.8 * x,
    "divided": lambda x, y, w: x / 1.25 + y,
    "times a parameter": lambda x, y, w: x * w + y,
    "both scaled": lambda x, y, w: (w * x) * 2 + y * w,
    "alpha": lambda x, y, w: torch.add(x, y, alpha=0.7),
    "alpha of x": lambda x, y, w: torch.add(y, x, alpha=0.7),
    "lerp": torch.lerp,
    "lerp by a number": lambda x, y, w: y.lerp(x, 0.4),
    "addcmul": torch.addcmul,
    "addcmul, weight first": lambda x, y, w: torch.addcmul(x, w, y, value=0.5),
    "addcmul to f(x)": lambda x, y, w: torch.addcmul(y, x, w),
    "stacked": lambda x, y, w: torch.stack([x, y]).sum(0),
    "stacked last": lambda x, y, w: torch.stack((y, x), -1).sum(dim=-1),
    "mean of a stack": lambda x, y, w: torch.stack([x, y, y], 1).mean(1),
    "copied": copied_and_added_in_place,
    "copied and scaled": filled_by_half,
    "summed from zero": lambda x, y, w: sum((x, y), torch.zeros(())),
}


class Joined(Block):
    """A block with another residual connection."""

    def __init__(self, join: Join) -> None:
        super().__init__(sdpa)
        self.join, self.weight = join, nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.join(x, self.attn(self.norm1(x), mask), self.weight)
        return self.join(x, self.mlp(self.norm2(x)), self.weight)


def case_of(*joins: Join) -> Case:
    """Blocks with these residual connections."""
    spellings = [sdpa] * len(joins)

    def build() -> nn.Module:
        model = Speller(*spellings)
        model.blocks = nn.ModuleList(map(Joined, joins))
        return lively(model)

    return replace(spelled_case("joined", *spellings), build=build)


# Two a model: most of the time of a test is its capture.
PAIRS = list(zip(list(JOINS)[::2], list(JOINS)[1::2], strict=True))


@pytest.mark.parametrize("names", PAIRS, ids=", ".join)
@torch.no_grad()
def test_residual_is_recognised_and_pruned_correctly(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    case = case_of(*map(JOINS.__getitem__, names))
    model = case.build()
    pruned = madtp.rewrite(model, case.inputs(3, 0), config=PruningConfig(merge=False, alignment_tokens=4))
    assert [s.name for s in pruned.report.sites] == ["blocks.0", "blocks.1"]
    assert not pruned.report.refusals
    call = case.inputs(3, 0)
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5
        dense = pruned.macs()
    forced = [torch.rand(3, LENGTH) < 0.5 for _ in range(2)]
    kept = survivors(case, {"image": [f & call["mask"] for f in forced]}, call)
    pruned.madtp.control.forced = dict(zip(("blocks.0", "blocks.1"), forced, strict=True))
    assert gap(expected(case, model, call, kept)[""], pruned(**call)) < 1e-5
    assert pruned.macs() < dense


# What f(x) is combined with is no earlier value of the stream: its place among the blocks is not known.
MISSES: dict[str, Join] = {
    "no residual": lambda x, y, w: y * w,
    "a product": lambda x, y, w: x * y,
    "f(x) as a weight": lambda x, y, w: torch.lerp(x, x.flip(-1), y.sigmoid()),
    "reduced over channels": lambda x, y, w: torch.stack([x, y]).sum((0, 3), keepdim=True)[0].expand_as(x),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_is_no_residual_is_refused(name: str) -> None:
    torch.manual_seed(0)
    case = case_of(MISSES[name])
    with pytest.raises(NoSiteError, match="no residual add follows it"):
        madtp.rewrite(case.build(), case.inputs(3, 0), config=PruningConfig(alignment_tokens=4))
