"""Norms that are spelled out become one node; what only looks like one keeps its spelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rewritten_models import gap
from torch import Tensor, fx, nn

from madtp.calls.call import normalise_call
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.nodes import op_name

Spelling = Callable[["Normed", Tensor], Tensor]


class Normed(nn.Module):
    """A norm over 8 channels, spelled by a function."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.shift = nn.Parameter(torch.rand(8))
        self.table = nn.Parameter(torch.rand(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x)


def weight_first(m: Normed, x: Tensor) -> Tensor:
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def weight_last(m: Normed, x: Tensor) -> Tensor:
    return torch.rsqrt((x * x).mean(2, keepdim=True) + 1e-5) * x * m.weight


def without_weight(m: Normed, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def cast_to_its_own_type(m: Normed, x: Tensor) -> Tensor:
    wide = x.float()
    return m.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def over_tokens(m: Normed, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def of_another_value(m: Normed, x: Tensor) -> Tensor:
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def fourth_power(m: Normed, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)


def root_read_twice(m: Normed, x: Tensor) -> Tensor:
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * root + root


def layer_norm(m: Normed, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return m.weight * ((x - mean) / torch.sqrt(variance + 1e-7)) + m.shift


def layer_norm_shifted(m: Normed, x: Tensor) -> Tensor:
    centred = x - x.mean(2, keepdim=True)
    return m.shift + centred / ((centred * centred).mean(2, keepdim=True) + 1e-5).sqrt() * m.weight


def layer_norm_alone(m: Normed, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def centred_over_tokens(m: Normed, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def not_centred(m: Normed, x: Tensor) -> Tensor:
    return x / ((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def multiplied_by_the_root(m: Normed, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() / centred


def run(spelling: Spelling, dtype: torch.dtype = torch.float32) -> tuple[fx.Graph, Tensor, Tensor]:
    """The canonical graph of a spelling, and what model and graph compute."""
    torch.manual_seed(0)
    model, x = Normed(spelling).to(dtype), torch.randn(3, 5, 8, dtype=dtype)
    captured = capture(model, normalise_call(model, (x,), {}))
    canonicalise(captured.graph)
    rewritten = fx.GraphModule(model, captured.graph)
    with torch.no_grad():
        return captured.graph, model(x), rewritten(x)[0]


def norms(graph: fx.Graph) -> int:
    return sum(n.op == "call_function" and op_name(n) in ("rms_norm", "layer_norm") for n in graph.nodes)


RECOGNISED = (
    weight_first,
    weight_last,
    without_weight,
    cast_to_its_own_type,
    layer_norm,
    layer_norm_shifted,
    layer_norm_alone,
)
MISSES = (
    over_tokens,
    of_another_value,
    fourth_power,
    root_read_twice,
    centred_over_tokens,
    not_centred,
    multiplied_by_the_root,
)


@pytest.mark.parametrize("spelling", RECOGNISED)
def test_a_spelled_norm_becomes_one_node(spelling: Spelling) -> None:
    graph, wanted, found = run(spelling)
    assert norms(graph) == 1
    assert not [
        n for n in graph.nodes if n.op == "call_function" and op_name(n) in ("rsqrt", "sqrt", "pow", "mean", "div")
    ]
    assert gap(wanted, found) < 1e-6


def test_a_weight_for_each_token_is_no_part_of_the_norm() -> None:
    graph, wanted, found = run(lambda m, x: m.table * without_weight(m, x))
    assert norms(graph) == 1
    assert gap(wanted, found) < 1e-6


@pytest.mark.parametrize("spelling", MISSES)
def test_near_misses_keep_their_spelling(spelling: Spelling) -> None:
    graph, wanted, found = run(spelling)
    assert norms(graph) == 0
    assert torch.equal(wanted, found)


def test_a_norm_that_casts_up_still_runs_in_the_wide_type() -> None:
    graph, wanted, found = run(cast_to_its_own_type, torch.bfloat16)
    (norm,) = (n for n in graph.nodes if n.op == "call_function" and op_name(n) == "rms_norm")
    assert norm.meta["val"].dtype == torch.float32
    assert found.dtype == torch.bfloat16
    assert gap(wanted.float(), found.float()) < 1e-2
