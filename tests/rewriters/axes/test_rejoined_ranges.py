"""Tokens cut into ranges and put together again run along the axis they came from; others begin one of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from madtp.calls.call import normalise_call
from madtp.tokens.segments import cut_ranges, rejoin
from madtp.tokens.state import TokenState
from rewriters.axes.labels import Axis, seed, token_axis
from rewriters.axes.propagate import propagate
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.nodes import op_name

TOKENS = 20
WHOLE = Axis("tokens", "s")
Cut = Callable[[Tensor], Tensor]

REJOINED: dict[str, Cut] = {
    "split": lambda x: torch.cat([2 * part for part in x.split([12, 8], 1)], 1),
    "sliced": lambda x: torch.cat([x[:, :12].exp(), x[:, 12:]], 1),
    "from the end": lambda x: torch.cat([x[:, :-9] + 1, x[:, -9:]], 1),
    "three parts": lambda x: torch.cat([x[:, :9], 2 * x[:, 9:15], x[:, 15:20].cos()], 1),
    "chunks": lambda x: torch.cat(x.chunk(2, dim=1), dim=-2),
    "few first": lambda x: torch.cat([x[:, :2].exp(), 3 * x[:, 2:]], 1),
    "few first of three": lambda x: torch.cat([2 * x[:, :2], x[:, 2:11], x[:, 11:]], 1),
}
OTHERS: dict[str, Cut] = {
    "in another order": lambda x: torch.cat([x[:, 12:], x[:, :12]], 1),
    "one is missing": lambda x: torch.cat([x[:, :11], x[:, 12:]], 1),
    "one twice": lambda x: torch.cat([x[:, :13], x[:, 12:]], 1),
    "not to the end": lambda x: torch.cat([x[:, :11], x[:, 11:18]], 1),
    "not from the beginning": lambda x: torch.cat([x[:, 9:12], x[:, 12:]], 1),
    "more first": lambda x: torch.cat([x[:, :3], x[:, 2:]], 1),
    "of two tensors": lambda x: torch.cat([x[:, :12], x[:, 2:][:, 10:]], 1),
}


class Cutting(nn.Module):
    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(x)


def axis_behind(cut: Cut) -> Axis | None:
    """The token axis of the last concatenation."""
    model = Cutting(cut)
    graph = capture(model, normalise_call(model, (torch.randn(2, TOKENS, 4),), {})).graph
    canonicalise(graph)
    nodes = list(graph.nodes)
    flow = propagate(nodes[1:], {nodes[0]: seed((2, TOKENS, 4), 0, 1, "s")})
    labels = flow.labels.of([node for node in nodes if op_name(node) == "cat"][-1])
    return token_axis(labels[1])


@pytest.mark.parametrize("name", REJOINED)
def test_ranges_in_order_are_the_tokens_again(name: str) -> None:
    assert axis_behind(REJOINED[name]) == WHOLE


@pytest.mark.parametrize("name", OTHERS)
def test_other_ranges_are_not(name: str) -> None:
    assert axis_behind(OTHERS[name]) != WHOLE


@pytest.mark.parametrize("static", [False, True])
def test_survivors_come_back_to_their_slots(static: bool) -> None:
    index = torch.tensor([[0, 3, 4, 7, 8], [1, 6, 7, 8, 8], [0, 1, 2, 3, 3]])
    valid = torch.tensor([[True] * 5, [True] * 4 + [False], [True] * 4 + [False]])
    merged = torch.zeros_like(valid)
    state = TokenState(full_length=9, length=5, batch=3, index=index, valid=valid, merged=merged, static=static)
    values = torch.randn(5, 3, 2)
    for starts in ((0, 4), (0, 2, 7), (0, -3)):
        parts = cut_ranges(values, state, 0, 1, starts)
        found = rejoin(parts, state, 0, 1, starts)
        assert torch.equal(found.transpose(0, 1)[valid], values.transpose(0, 1)[valid])
