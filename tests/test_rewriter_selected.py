"""Additions to rows that a mask selects: followed as additions at every position."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from madtp.calls import normalise_call
from rewriters.canonicalise import canonicalise
from rewriters.capture import Region, capture
from rewriters.outcomes import op_name

Change = Callable[[Tensor, Tensor, Tensor], Tensor]


def read_and_written(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    x = x.clone()
    x[mask, :] = x[mask, :] + rows
    return x


def the_other_way_round(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    read = x[mask]
    x = x.clone()
    x[mask] = rows + read
    return x


def in_place(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    x = x.clone()
    x[mask] += rows
    return x


def accumulated(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.index_put((mask,), rows, accumulate=True)


def written(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.index_put((mask,), rows)


def read_elsewhere(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.index_put((mask,), x.exp()[mask] + rows)


def of_another_mask(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.index_put((mask,), x[mask.flip(1)] + rows)


def one_row_for_all(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.index_put((mask,), x[mask] + rows[:1])


def scaled(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.index_put((mask,), torch.add(x[mask], rows, alpha=2))


class Changing(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return self.change(x, mask, rows)


def _canonical(change: Change) -> tuple[set[str], Tensor, Tensor]:
    """Names of the operations, what the module returns, and what the graph returns."""
    torch.manual_seed(0)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1:4] = mask[1, 2:5] = True
    inputs = (torch.randn(2, 6, 4), mask, torch.randn(6, 4))
    module = Changing(change)
    captured = capture(module, normalise_call(module, inputs, {}), Region("part"))
    canonicalise(captured.graph)
    names = {op_name(node) for node in captured.graph.nodes if node.op == "call_function"}
    return names, module(*inputs), torch.fx.GraphModule(module, captured.graph)(*inputs)[0]


@pytest.mark.parametrize("change", [read_and_written, the_other_way_round, in_place, accumulated])
def test_an_addition_to_selected_rows_is_one_at_every_position(change: Change) -> None:
    names, wanted, found = _canonical(change)
    assert names.isdisjoint({"index", "index_put"})
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("change", [written, read_elsewhere, of_another_mask, one_row_for_all, scaled])
def test_other_writes_to_selected_rows_stay(change: Change) -> None:
    names, wanted, found = _canonical(change)
    assert "index_put" in names
    assert torch.equal(wanted, found)
