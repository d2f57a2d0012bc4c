"""Concatenations with nothing: a model that joins its special tokens to the others, and has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import madtp
from madtp.calls.call import normalise_call
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.nodes import op_name


class Joined(nn.Module):
    """Blocks whose queries and keys are turned behind the first ``prefix`` tokens. last: the others stand in front of them."""

    def __init__(self, prefix: int, last: bool = False) -> None:
        super().__init__()
        self.prefix, self.last = prefix, last
        self.blocks = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def turned(self, x: Tensor) -> Tensor:
        first, others = x[:, : self.prefix], x[:, self.prefix :]
        others = others * torch.linspace(0.5, 1.5, others.shape[1]).view(1, -1, 1)
        return torch.cat([others, first] if self.last else [first, others], dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            query, key, value = block(norm(tokens)).chunk(3, dim=-1)
            tokens = tokens + nn.functional.scaled_dot_product_attention(self.turned(query), self.turned(key), value)
        return self.head(tokens.mean(1))


def _operations(model: nn.Module, tokens: Tensor) -> tuple[list[str], Tensor]:
    """Names of the operations of the canonical graph, and what it returns."""
    captured = capture(model, normalise_call(model, (tokens,), {}))
    canonicalise(captured.graph)
    names = [op_name(node) for node in captured.graph.nodes if node.op == "call_function"]
    return names, torch.fx.GraphModule(model, captured.graph)(tokens)[0]


@pytest.mark.parametrize("last", [False, True])
def test_a_stream_joined_with_nothing_is_one_stream(last: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Joined(0, last).eval(), torch.randn(2, 12, 16)
    names, found = _operations(model, tokens)
    assert "cat" not in names
    assert torch.allclose(found, model(tokens), atol=1e-6)
    pruned = madtp.rewrite(model, {"tokens": tokens})
    assert len(pruned.report.sites) == 2
    assert not pruned.report.refusals


def test_special_tokens_stay_joined() -> None:
    torch.manual_seed(0)
    model, tokens = Joined(2).eval(), torch.randn(2, 12, 16)
    names, found = _operations(model, tokens)
    assert names.count("cat") == 4
    assert torch.allclose(found, model(tokens), atol=1e-6)
    assert len(madtp.rewrite(model, {"tokens": tokens}).report.sites) == 2


def test_nothing_of_another_type_decides_the_type_of_the_result() -> None:
    class Wider(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.new_zeros(x.shape[0], 0, dtype=torch.float64), x], dim=1)

    names, found = _operations(Wider(), torch.ones(2, 3))
    assert "cat" in names
    assert found.dtype is torch.float64


def test_a_tensor_that_is_joined_with_itself_stays() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x[:, :0], x], dim=1)

    names, found = _operations(Doubled(), torch.ones(2, 3))
    assert "cat" in names
    assert found.shape == (2, 6)
