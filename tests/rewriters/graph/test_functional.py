"""Writes into tensors: through views, of constants, in loops; what cannot be told is left as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_vit import images, vit
from torch import Tensor, fx, nn

import madtp
from madtp.calls.call import Call
from madtp.programs.compiled_graph import compile_graph
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.functional import writes

Function = Callable[[Tensor], Tensor]


class Applied(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _canonical(function: Function, x: Tensor) -> tuple[fx.Graph, Tensor]:
    """The graph and what it computes."""
    model = Applied(function)
    captured = capture(model, Call((x,), {}))
    canonicalise(captured.graph)
    model.__dict__.update(captured.constants)
    return captured.graph, compile_graph(captured.graph, "test")(model, x.clone())[0]


def rows(x: Tensor) -> Tensor:
    out = torch.empty(2, 4, 3)
    for i in range(2):
        out[i, :2] = x[i, :2] * 2
        out[i, 2:] = x[i, 3]
    return out + 1


def prefix(x: Tensor) -> Tensor:
    mask = torch.ones_like(x)
    mask[:, :2] = 0
    return x * mask.reshape(x.shape)


def through_one_view_twice(x: Tensor) -> Tensor:
    y = x * 2
    row = y[:, 1]
    row.add_(1)
    row.mul_(3)
    return y + row[:, None]


def a_view_from_before(x: Tensor) -> Tensor:
    y = x * 2
    turned = y.transpose(1, 2)
    y[:, 0] = 5.0
    return turned.sum(1)


def the_result_of_the_write(x: Tensor) -> Tensor:
    y = x.clone()
    first = y[:, 0]
    z = first.zero_()
    y[:, 0].add_(2)
    return z + y.sum(1)


def of_another_type(x: Tensor) -> Tensor:
    y = x.to(torch.float64)
    y[:, 1:3] = x[:, :1]
    return y


def fresh(x: Tensor) -> Tensor:
    y = x @ x.transpose(1, 2)
    return y.masked_fill_(y > 0, 1.0).add_(1)


def in_halves(x: Tensor) -> Tensor:
    y = x * 2
    left, right = y.split(2, 1)
    y[:, 1] = 7.0
    return left + right


@pytest.mark.parametrize(
    "function",
    [
        rows,
        prefix,
        through_one_view_twice,
        a_view_from_before,
        the_result_of_the_write,
        of_another_type,
        fresh,
        in_halves,
    ],
    ids=lambda f: f.__name__,
)
def test_writes_become_values(function: Function) -> None:
    x = torch.randn(2, 4, 3)
    graph, found = _canonical(function, x)
    assert torch.equal(found, function(x.clone()))
    assert not any(writes(node) for node in graph.nodes)


def into_a_turned_view(x: Tensor) -> Tensor:
    y = x * 2
    y.transpose(1, 2)[:, 0] = 1.0
    return y


def into_what_may_be_a_copy(x: Tensor) -> Tensor:
    y = x * 2
    y.flatten(1)[:, 0] = 1.0
    return y


def into_the_input(x: Tensor) -> Tensor:
    x[:, 0] = 1.0
    return x * 2


@pytest.mark.parametrize(
    "function", [into_a_turned_view, into_what_may_be_a_copy, into_the_input], ids=lambda f: f.__name__
)
def test_other_writes_stay_and_do_what_they_did(function: Function) -> None:
    x = torch.randn(2, 4, 3)
    graph, found = _canonical(function, x)
    assert torch.equal(found, function(x.clone()))
    assert any(writes(node) for node in graph.nodes)


class Hide(nn.Module):
    """Hides the last patch in the attention of others by a constant that is made on the way."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[0], 1, 1, x.shape[1], dtype=torch.bool)
        mask[:, :, :, -1] = True
        return torch.where(mask, torch.tensor(-1e9), 0.0)


class Written(nn.Module):
    """Position embeddings that are written in two parts, and a mask that is written by an inner module."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(depth=2)
        self.table = nn.Parameter(torch.randn(64, 32))
        self.hide = Hide()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit.patch_embed(x)
        places = torch.empty_like(tokens)
        places[:, :32] = self.table[:32]
        places[:, 32:] = self.table[0]
        mask = self.hide(tokens)
        tokens = tokens + places
        for block in self.vit.blocks:
            tokens = block(tokens, attn_mask=mask)
        return tokens.mean(1)


def test_a_model_that_writes_is_rewritten() -> None:
    model, inputs = Written().eval(), images(2, 0)
    pruned = madtp.rewrite(model, (inputs,))
    assert len(pruned.report.sites) == 2
    with torch.no_grad(), pruned.dense():
        assert torch.allclose(pruned(inputs), model(inputs), atol=1e-6)
    pruned(inputs).sum().backward()
    assert model.table.grad is not None
