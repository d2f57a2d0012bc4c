"""Masked means become one node; divisions that only look like one keep their spelling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from rewritten_models import gap
from torch import Tensor, fx, nn

from madtp.calls.call import normalise_call
from rewriters.canonicalise.pooling import canonical_pooling
from rewriters.capture.export import capture
from rewriters.graph.match import because
from rewriters.graph.nodes import op_name

Spelling = Callable[[Tensor, Tensor], Tensor]


class Pooled(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.spelling(x, mask)


@dataclass(frozen=True)
class Canonical:
    """Operations that are left of a pooling, why its sums stayed, and its error."""

    names: list[str]
    misses: list[str]
    error: float


def run(spelling: Spelling) -> Canonical:
    torch.manual_seed(0)
    given = torch.randn(3, 5, 4), (torch.rand(3, 5) < 0.6).float().index_fill(1, torch.tensor([0]), 1.0)
    model = Pooled(spelling)
    graph = capture(model, normalise_call(model, given, {})).graph
    canonical_pooling(graph)
    graph.eliminate_dead_code()
    graph.lint()
    found = fx.GraphModule(model, graph)(*given)[0]
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    return Canonical(
        names=[op_name(n) for n in nodes],
        misses=[because(n) for n in nodes if op_name(n) == "sum"],
        error=gap(model(*given), found),
    )


def plain(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1)
    return (x * weight).sum(1) / weight.sum(1)


def commuted(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask[:, :, None].to(x.dtype)
    return torch.sum(weight * x, 1) / torch.clamp(weight.sum(1), min=1e-9)


def expanded(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1).expand(x.size()).float()
    return torch.sum(x * weight, 1) / weight.sum(1).clamp(min=1e-9)


def kept_dimension(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1)
    return (x * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("spelling", [plain, commuted, expanded, kept_dimension])
def test_a_masked_mean_becomes_one_node(spelling: Spelling) -> None:
    canonical = run(spelling)
    assert "masked_mean" in canonical.names
    assert "div" not in canonical.names
    assert canonical.error < 1e-6


def other_weights(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask.unsqueeze(-1)).sum(1) / (1 - mask).unsqueeze(-1).sum(1).clamp(min=1)


def not_weighed(x: Tensor, mask: Tensor) -> Tensor:
    return x.sum(1) / mask.unsqueeze(-1).sum(1)


def over_channels(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask.unsqueeze(-1)).sum(2) / mask.unsqueeze(-1).sum(1)


def bounded_above(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1)
    return (x * weight).sum(1) / weight.sum(1).clamp(1.0, 2.0)


def a_constant_number(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask.unsqueeze(-1)).sum(1) / 5.0


OTHERS = {
    other_weights: "the sum that divides is not that of its weights",
    not_weighed: "not multiplied by the weights",
    over_channels: "the sum that divides is not that of its weights",
    bounded_above: "",
    a_constant_number: "",
}


@pytest.mark.parametrize(("spelling", "reason"), OTHERS.items(), ids=[spelling.__name__ for spelling in OTHERS])
def test_other_divisions_keep_their_spelling_and_say_why(spelling: Spelling, reason: str) -> None:
    canonical = run(spelling)
    assert "masked_mean" not in canonical.names
    assert "div" in canonical.names
    assert any(reason in miss for miss in canonical.misses), canonical.misses
    assert canonical.error == 0
