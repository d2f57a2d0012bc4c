"""What is not pruned is told, or an error where the configuration is strict."""

from __future__ import annotations

import logging

import pytest
import torch
from joint_stream_models import Block
from model_case import WIDTH
from torch import Tensor, nn

import madtp
from madtp.errors import UnprunedError
from madtp.programs.notes import Notes


class Unknown(nn.Module):
    """Sorts the tokens of a channel, which reads them by their places."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.sort(dim=1).values


class OddBlock(Block):
    """Normalises the scores over the queries, which is no attention that is known."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3)).softmax(-2) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """Blocks, and behind some of them an operation that stands in the way of those before it."""

    def __init__(self, behind: int | None, depth: int = 4, block: type[Block] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.behind, self.unknown, self.head = behind, Unknown(), nn.Linear(WIDTH, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == self.behind:
                x = self.unknown(x)
        found: Tensor = self.head(x.mean(1))
        return found


class Towers(nn.Module):
    """Two towers, of which the second is ``other``."""

    def __init__(self, other: Tower) -> None:
        super().__init__()
        self.first, self.other = Tower(None), other

    def forward(self, pixels: Tensor, more: Tensor) -> Tensor:
        found: Tensor = self.first(pixels) + self.other(more)
        return found


PIXELS = torch.zeros(2, 3, 32, 32)


def config(**settings: object) -> madtp.PruningConfig:
    return madtp.PruningConfig(alignment=False, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Tower(None), ""),
        (Tower(0), ""),  # one of four
        (Tower(1), "2 of 4 blocks are not pruned. blocks.0, blocks.1: "),
        (Towers(Tower(None)), ""),
        (
            Towers(Tower(None, depth=2, block=OddBlock)),
            "2 of 6 blocks are not pruned. other.blocks.0, other.blocks.1: ",
        ),
    ],
    ids=["whole", "a quarter", "half", "two whole", "a tower"],
)
def test_a_tower_or_a_third_of_the_blocks(
    model: nn.Module, told: str, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = (PIXELS,) if isinstance(model, Tower) else (PIXELS, PIXELS)
    with caplog.at_level(logging.WARNING, "madtp"):
        if told and strict:
            with pytest.raises(UnprunedError, match="strict=True"):
                madtp.rewrite(model, inputs, config=config(strict=True))
            return
        pruned = madtp.rewrite(model, inputs, config=config(strict=strict))
    remarks = [note for note in pruned.report.notes if "are not pruned" in note]
    assert len(remarks) == bool(told)
    if told:
        assert remarks[0].startswith(told)
        assert ("sort" in remarks[0]) == isinstance(model, Tower)
        assert remarks[0] in caplog.text


def test_a_tower_is_not_taken_for_a_layer_of_experts() -> None:
    """What sorts tokens keeps its place in the graph, and the blocks around it are seen."""
    pruned = madtp.rewrite(Towers(Tower(1, depth=2)), (PIXELS, PIXELS), config=config())
    assert {site.name for site in pruned.report.sites} >= {"other.blocks.0", "other.blocks.1"}


def test_what_was_asked_for_is_not_told() -> None:
    model, inputs = Towers(Tower(None)), (PIXELS, PIXELS)
    plan = madtp.Plan.from_dict(madtp.rewrite(model, inputs, config=config()).report.plan)
    fewer = plan.without([f"first.blocks.{layer}" for layer in range(4)])
    pruned = madtp.rewrite(model, inputs, config=config(strict=True), plan=fewer)
    assert not [note for note in pruned.report.notes if "are not pruned" in note]


def test_a_call_that_runs_unpruned_is_an_error_where_the_configuration_is_strict() -> None:
    report = madtp.rewrite(Tower(None), (PIXELS,), config=config()).report
    Notes(report).unpruned("tower", "it takes another way")
    assert report.notes == ["calls of tower that run unpruned: it takes another way"]
    with pytest.raises(
        UnprunedError, match=r"calls of tower that run unpruned: it takes another way. Leave strict=True out"
    ):
        Notes(report, strict=True).unpruned("tower", "it takes another way")
