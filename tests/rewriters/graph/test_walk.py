"""Walks reach what they should, once, nearest first, and stop where they are told to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rewriters.graph.nodes import AxisError, int_argument, ints_argument, op_name, operand, permutation
from rewriters.graph.op_sets import KEEPS_VALUES, PERMUTATIONS, RESHAPES, SAME_VALUES, VIEWS
from rewriters.graph.walk import ancestors, behind, descendants, operand_chain, positions, walk

aten = torch.ops.aten


class Diamond(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left = aten.relu.default(x)
        first = aten.tanh.default(left)
        second = aten.exp.default(left)
        return aten.neg.default(aten.add.Tensor(first, aten.mul.Tensor(second, y)))


@pytest.fixture
def nodes() -> dict[str, fx.Node]:
    """The nodes of a diamond, by operation or name."""
    return {op_name(node): node for node in fx.symbolic_trace(Diamond()).graph.nodes}


def names(found: Iterable[fx.Node]) -> list[str]:
    return [op_name(node) for node in found]


def test_ancestors_come_once_and_nearest_first(nodes: dict[str, fx.Node]) -> None:
    assert names(ancestors(nodes["neg"])) == ["neg", "add", "tanh", "mul", "relu", "exp", "y", "x"]
    assert names(ancestors(nodes["tanh"], nodes["mul"])) == ["tanh", "mul", "relu", "exp", "y", "x"]


def test_descendants_are_what_is_computed_from_a_node(nodes: dict[str, fx.Node]) -> None:
    assert names(descendants(nodes["exp"])) == ["exp", "mul", "add", "neg", "output"]


def test_a_walk_yields_where_it_may_not_go_on_but_not_where_it_may_not_enter(nodes: dict[str, fx.Node]) -> None:
    assert names(ancestors(nodes["add"], through=lambda n: op_name(n) != "mul")) == ["add", "tanh", "mul", "relu", "x"]
    assert names(ancestors(nodes["add"], among=lambda n: op_name(n) != "mul")) == ["add", "tanh", "relu", "x"]


def test_a_walk_asks_for_no_more_than_its_caller_reads(nodes: dict[str, fx.Node]) -> None:
    asked: list[str] = []

    def onward(node: fx.Node) -> list[fx.Node]:
        asked.append(op_name(node))
        return node.all_input_nodes

    assert names(itertools.islice(walk([nodes["neg"]], onward), 3)) == ["neg", "add", "tanh"]
    assert asked == ["neg", "add"]


def test_the_operand_chain_follows_first_operands(nodes: dict[str, fx.Node]) -> None:
    assert names(operand_chain(nodes["neg"], lambda n: op_name(n) != "tanh")) == ["neg", "add", "tanh"]
    assert names(operand_chain(1.0, lambda n: True)) == []
    assert behind(nodes["neg"], {"neg", "add", "tanh"}) is nodes["relu"]
    assert behind(nodes["relu"], {"neg"}) is nodes["relu"]
    assert behind(2, {"neg"}) == 2


def test_nodes_compare_as_their_positions_do(nodes: dict[str, fx.Node]) -> None:
    order = positions(nodes["neg"].graph)
    for one, other in itertools.permutations(order, 2):
        assert (one < other) == (order[one] < order[other])


PERMUTED = (
    (aten.permute.default, ([2, 0, -2],)),
    (aten.transpose.int, (0, -1)),
    (aten.swapaxes.default, (1, 2)),
    (aten.movedim.intlist, ([0, 1], [-1, 0])),
    (aten.movedim.int, (0, 2)),
    (aten.mT.default, ()),
    (aten.numpy_T.default, ()),
)


@pytest.mark.parametrize(("target", "arguments"), PERMUTED, ids=lambda value: str(value))
def test_a_permutation_says_where_each_dimension_comes_from(
    target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    graph = fx.Graph()
    node = graph.call_function(target, (graph.placeholder("x"), *arguments))
    value = torch.randn(2, 3, 4)
    moved: Tensor = target(value, *arguments)
    assert torch.equal(moved, value.permute(permutation(node, 3)))


def test_an_argument_of_another_kind_is_an_error_of_its_own() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.select.int, (1.0, x, 0))
    with pytest.raises(AxisError, match="argument 0 of select"):
        operand(node)
    with pytest.raises(AxisError, match="'dim' of select"):
        int_argument(node, 1, "dim")
    with pytest.raises(AxisError, match="'dim' of select"):
        ints_argument(node, 1, "dim")
    assert int_argument(node, 2, "index") == 0
    assert ints_argument(node, 2, "index") == (0,)


FORMS = {
    "to": lambda x: aten.to.dtype(x, torch.float64),
    "_to_copy": lambda x: aten._to_copy.default(x, dtype=torch.float64),
    "type_as": lambda x: aten.type_as.default(x, x.double()),
    "clone": aten.clone.default,
    "contiguous": aten.contiguous.default,
    "alias": aten.alias.default,
    "detach": aten.detach.default,
    "view": lambda x: aten.view.default(x, [6, 4]),
    "reshape": lambda x: aten.reshape.default(x, [6, 4]),
    "_unsafe_view": lambda x: aten._unsafe_view.default(x, [6, 4]),
    "flatten": lambda x: aten.flatten.using_ints(x, 0, 1),
    "unflatten": lambda x: aten.unflatten.int(x, 2, [2, 2]),
    "view_as": lambda x: aten.view_as.default(x, x.reshape(6, 4)),
    "reshape_as": lambda x: aten.reshape_as.default(x, x.reshape(6, 4)),
    "unsqueeze": lambda x: aten.unsqueeze.default(x, 1),
    "squeeze": lambda x: aten.squeeze.default(x),
}


def test_every_operation_that_keeps_values_or_their_order_has_a_form_here() -> None:
    assert FORMS.keys() == (KEEPS_VALUES | VIEWS) - {"float"}


@pytest.mark.parametrize("name", FORMS)
def test_an_operation_has_the_property_of_its_set(name: str) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    found = FORMS[name](x)
    assert torch.equal(found.float().flatten(), x.flatten())
    assert (found.shape == x.shape) or name in VIEWS
    assert found.requires_grad == (name in SAME_VALUES | VIEWS)
    assert not (RESHAPES | PERMUTATIONS) & KEEPS_VALUES
