"""Additions to rows that a mask selects: followed as additions at every position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import madtp
from madtp.calls.call import normalise_call
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.capture.scope import Region
from rewriters.graph.match import because
from rewriters.graph.nodes import op_name

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


def scattered(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    places = mask[:, :, None]
    return x.masked_scatter(places, (x[places.squeeze(-1)] + rows).view(-1))


def scattered_widely(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    places = mask.unsqueeze(-1).expand_as(x)
    return x.masked_scatter(places, (rows + x.contiguous()[places[..., 0]]).reshape(-1, 2))


def scattered_alone(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.masked_scatter(mask[:, :, None], rows)


def scattered_by_another_mask(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.masked_scatter(mask.flip(1)[:, :, None], x[mask] + rows)


def scattered_by_channels(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    places = torch.cat((mask[:, :, None], mask.flip(1)[:, :, None].expand(-1, -1, 3)), 2)
    return x.masked_scatter(places, x[places[..., 0]] + rows)


def scattered_across(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.masked_scatter(mask[:, :, None], (x[mask] + rows).t().reshape(-1))


class Changing(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return self.change(x, mask, rows)


@dataclass(frozen=True)
class Canonical:
    """Names of the operations of a graph, why a write in it stayed, what the module returns and what the graph returns."""

    names: set[str]
    misses: list[str]
    wanted: Tensor
    found: Tensor


def _canonical(change: Change) -> Canonical:
    torch.manual_seed(0)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1:4] = mask[1, 2:5] = True
    inputs = (torch.randn(2, 6, 4), mask, torch.randn(6, 4))
    module = Changing(change)
    captured = capture(module, normalise_call(module, inputs, {}), Region("part"))
    canonicalise(captured.graph)
    nodes = [node for node in captured.graph.nodes if node.op == "call_function"]
    return Canonical(
        names={op_name(node) for node in nodes},
        misses=[because(node) for node in nodes if op_name(node) in ("index_put", "masked_scatter")],
        wanted=module(*inputs),
        found=torch.fx.GraphModule(module, captured.graph)(*inputs)[0],
    )


ADDITIONS = [read_and_written, the_other_way_round, in_place, accumulated, scattered, scattered_widely]
OTHERS = {
    written: "it replaces rows that a mask selects",
    read_elsewhere: "not the rows that it replaces",
    of_another_mask: "not the rows that it replaces",
    one_row_for_all: "does not add one row of the tokens' type to each",
    scaled: "or scales what it adds",
    scattered_alone: "it replaces rows that a mask selects",
    scattered_by_another_mask: "not the rows that it replaces",
    scattered_by_channels: "its mask differs from channel to channel",
    scattered_across: "it replaces rows that a mask selects",
}


@pytest.mark.parametrize("change", ADDITIONS)
def test_an_addition_to_selected_rows_is_one_at_every_position(change: Change) -> None:
    canonical = _canonical(change)
    assert canonical.names.isdisjoint({"index", "index_put"})
    assert torch.equal(canonical.wanted, canonical.found)


@pytest.mark.parametrize(("change", "reason"), OTHERS.items(), ids=[change.__name__ for change in OTHERS])
def test_other_writes_to_selected_rows_stay_and_say_why(change: Change, reason: str) -> None:
    canonical = _canonical(change)
    assert "new_zeros" not in canonical.names
    assert any(reason in miss for miss in canonical.misses), canonical.misses
    assert torch.equal(canonical.wanted, canonical.found)


class Stacked(nn.Module):
    """Three blocks, with rows [n, C] scattered onto the tokens of a mask [B, N] behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(3)
        )

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = scattered(x, mask, rows)
        for block in list(self.blocks)[1:]:
            x = block(x)
        return x[:, 0]


def test_rows_scattered_between_blocks_go_to_the_tokens_that_are_left() -> None:
    torch.manual_seed(0)
    model = Stacked().eval()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 1:4] = mask[1, 3:7] = True
    given = {"x": torch.randn(2, 9, 16), "mask": mask, "rows": torch.randn(7, 16)}
    pruned = madtp.rewrite(model, given, config=madtp.PruningConfig(alignment_tokens=8))
    assert len(pruned.report.sites) >= 2
    with torch.no_grad():
        with pruned.dense():
            torch.testing.assert_close(pruned(**given), model(**given))
        pruned.temperature = 4.0
        both = pruned(**given)
        assert not torch.allclose(both, model(**given))
        mates = {**given, "x": torch.stack((given["x"][0], torch.randn(9, 16)))}
        mates["rows"] = torch.cat((given["rows"][:3], torch.randn(4, 16)))
        torch.testing.assert_close(pruned(**mates)[0], both[0])


class WrittenBeforeAttention(Stacked):
    """Rows are replaced, by a mask, between a norm and the attention that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        x = self.blocks[0](x)
        y = written(x, mask, rows)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.blocks[1](x)[:, 0]


def test_a_refused_write_says_where_it_differs_from_an_addition() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 4] = mask[:, 2] = mask[:, 6] = True
    given = {"x": torch.randn(2, 9, 16), "mask": mask, "rows": torch.randn(6, 16)}
    pruned = madtp.rewrite(WrittenBeforeAttention().eval(), given, config=madtp.PruningConfig(alignment_tokens=8))
    reasons = [refusal.reason for refusal in pruned.report.refusals]
    assert any("index_put needs every position (it replaces rows that a mask selects" in r for r in reasons), reasons
