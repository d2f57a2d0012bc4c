"""Tensors that are made empty and filled range by range are concatenations, as keys of a turned and an unturned part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import eager_arithmetic, gap
from torch import Tensor, nn

import madtp
from madtp.calls.call import normalise_call
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.match import because
from rewriters.graph.nodes import op_name

Function = Callable[[Tensor], Tensor]


def in_order(x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], 7)
    y[..., :4].copy_(x)
    y[..., 4:].copy_(x[..., :3] * 2)
    return y


def from_behind(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], x.shape[1], 7)
    y[..., 4:] = x[..., :3]
    y[..., 2:4] = x[..., 2:]
    y[..., :2] = x[..., :2]
    return y


def of_one_row_for_all(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., :1].copy_(x[:, :1, :1])
    y[..., 1:].copy_(x[..., 1:])
    return y


def with_a_gap(x: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], 7)
    y[..., :4] = x
    y[..., 5:] = x[..., :2]
    return y


def written_twice(x: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], 7)
    y[..., :4] = x
    y[..., 3:] = x
    return y


def along_two_dimensions(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 5, 4)
    y[:, :2] = x[:, :2]
    y[..., 2:] = x[:, :1, 2:]
    return y


def into_what_was_there(x: Tensor) -> Tensor:
    y = x * 1
    y[..., :2] = x[..., 2:]
    y[..., 2:] = x[..., :2]
    return y


@dataclass(frozen=True)
class Canonical:
    """Names of the operations of a graph, why a write in it stayed, and what the graph returns."""

    names: list[str]
    misses: list[str]
    found: Tensor


def _canonical(function: Function, x: Tensor) -> Canonical:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    captured = capture(Model(), normalise_call(Model(), (x,), {}))
    canonicalise(captured.graph)
    nodes = [node for node in captured.graph.nodes if node.op == "call_function"]
    return Canonical(
        names=[op_name(node) for node in nodes],
        misses=[because(node) for node in nodes if op_name(node) == "slice_scatter"],
        found=torch.fx.GraphModule(Model(), captured.graph)(x)[0],
    )


@pytest.mark.parametrize("function", [in_order, from_behind, of_one_row_for_all], ids=lambda f: f.__name__)
def test_ranges_that_fill_a_new_tensor_are_a_concatenation(function: Function) -> None:
    x = torch.randn(2, 5, 4)
    canonical = _canonical(function, x)
    assert torch.equal(canonical.found, function(x))
    assert "cat" in canonical.names
    assert "slice_scatter" not in canonical.names


OTHERS = {
    with_a_gap: "leave a gap or overlap",
    written_twice: "leave a gap or overlap",
    along_two_dimensions: "a range is written whose place is not known",
    into_what_was_there: "a tensor that holds values",
}


@pytest.mark.parametrize(("function", "reason"), OTHERS.items(), ids=[function.__name__ for function in OTHERS])
def test_other_writes_stay_and_say_why(function: Function, reason: str) -> None:
    x = torch.randn(2, 5, 4)
    canonical = _canonical(function, x)
    assert torch.equal(canonical.found, function(x))
    assert any(reason in miss for miss in canonical.misses), canonical.misses


class Latent(nn.Module):
    """Attention whose keys are a part of each head and a part that all heads share. hidden: as in an oracle, [B, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.queries = nn.ModuleList(nn.Linear(16, 2 * 8) for _ in range(3))
        self.keys = nn.ModuleList(nn.Linear(16, 2 * (6 + 8) + 2) for _ in range(3))
        self.outs = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = iter(self.hidden)
        for norm, query, key, out in zip(self.norms, self.queries, self.keys, self.outs, strict=True):
            y = norm(x)
            q = query(y).unflatten(-1, (2, 8)).transpose(1, 2)
            own, shared = key(y).split([28, 2], -1)
            nope, v = own.unflatten(-1, (2, 14)).transpose(1, 2).split([6, 8], -1)
            k = nope.new_empty(*nope.shape[:-1], 8)
            k[..., :6].copy_(nope)
            k[..., 6:].copy_(shared[:, None].expand(-1, 2, -1, -1))
            mask = next(hidden, None)
            visible = None if mask is None else ~mask[:, None, None]
            x = x + out(F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2))
        return x.mean(1)


@torch.no_grad()
def test_attention_to_keys_that_are_filled_in_is_pruned() -> None:
    torch.manual_seed(0)
    model, x = Latent().eval(), torch.randn(3, 12, 16)
    pruned = madtp.rewrite(model, {"x": x}, config=madtp.PruningConfig(alignment_tokens=4, temperature=2.0))
    assert len(pruned.report.sites) == 3
    assert not pruned.report.refusals
    with pruned.dense():
        assert gap(model(x), pruned(x=x)) < 1e-5
    with eager_arithmetic():
        assert gap(pruned(x=x)[:1], pruned(x=x[:1])) < 1e-5
