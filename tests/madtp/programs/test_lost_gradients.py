"""Parameters that get a gradient in the original get one in the pruned model, or it is told and the original runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from joint_stream_models import Encoder, Patches
from model_case import WIDTH, lively
from torch import Tensor, nn

import madtp
from madtp.calls.call import Call
from madtp.programs.lost_gradients import lost_gradients


class Remembering(nn.Module):
    """Computes the positions of its tokens once, and keeps them with what autograd has recorded of them."""

    def __init__(self, by_regions: bool) -> None:
        super().__init__()
        self.patches, self.encoder, self.head = Patches(), Encoder(2), nn.Linear(WIDTH, 3)
        self.table, self.width = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(17, WIDTH))
        self.kept: dict[str, Tensor] = {}
        self.by_regions = by_regions

    def forward(self, pixels: Tensor) -> Tensor:
        if "positions" not in self.kept:
            self.kept["positions"] = self.table(self.width)
        x = self.encoder(self.patches(pixels) + self.kept["positions"])[:, 0]
        if self.by_regions and float(x.detach().sum()) > 1e9:
            x = x * 2
        return self.head(x)


def gradients(model: nn.Module, pixels: Tensor) -> set[str]:
    model.zero_grad()
    model(pixels).sum().backward(retain_graph=True)
    return {name for name, p in model.named_parameters() if p.grad is not None and not name.startswith("madtp")}


@pytest.mark.parametrize("called_before", [False, True])
def test_a_value_with_gradients_that_became_a_constant_is_told(called_before: bool) -> None:
    torch.manual_seed(0)
    model, pixels = lively(Remembering(by_regions=False)), torch.randn(3, 3, 32, 32)
    if called_before:
        model(pixels)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=4))
    assert any("table.weight" in note for note in pruned.report.notes) is called_before
    wanted = gradients(model, pixels)
    assert gradients(pruned, pixels) == wanted
    assert bool(pruned.report.unpruned) is called_before
    with torch.no_grad():
        pruned(pixels)
    assert all((kept < 17).any() for kept in pruned.token_counts().values())


def test_where_python_stays_in_charge_nothing_is_lost() -> None:
    torch.manual_seed(0)
    model, pixels = lively(Remembering(by_regions=True)), torch.randn(3, 3, 32, 32)
    model(pixels)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=4))
    assert pruned.report.capture == "regions"
    assert gradients(pruned, pixels) == gradients(model, pixels)
    assert not pruned.report.unpruned


@pytest.mark.parametrize(
    ("forward", "lost"),
    [
        (lambda model, x: model(x), ()),
        (lambda model, x: nn.functional.linear(x, model.weight.detach(), model.bias), ("weight",)),
        (lambda model, x: model(x.detach()), ("input 0",)),
        (lambda model, x: model(x).detach(), ("weight", "bias", "input 0")),
    ],
)
def test_lost_are_those_that_the_original_reaches(forward: Callable[..., Tensor], lost: tuple[str, ...]) -> None:
    model, call = nn.Linear(3, 2), Call((torch.randn(4, 3, requires_grad=True),), {})
    found = lost_gradients(model, call, lambda own: model(*own.args), lambda own: forward(model, *own.args))
    assert found == lost
    assert not lost_gradients(model, call, lambda own: forward(model, *own.args), lambda own: model(*own.args))


def test_a_model_without_gradients_is_not_run() -> None:
    def fail(call: Call) -> None:
        raise AssertionError

    assert not lost_gradients(nn.Linear(3, 2).requires_grad_(False), Call((torch.randn(4, 3),), {}), fail, fail)
