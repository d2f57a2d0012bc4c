"""Sources of token axes: what they are derived from, and labels of one result and of several."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from rewriters.axes.labels import Axis, Factor, LabelMap, Labels, ResultLabels, plain, seed
from rewriters.axes.sources import BatchPart, Concatenation, Rest, Source, TokenRange, is_joined, parents, roots
from rewriters.graph.nodes import AxisError


def joined(*operands: Source | None) -> Concatenation:
    graph = fx.Graph()
    return Concatenation(operands, graph.call_function(torch.cat))


def test_an_origin_is_its_own_root() -> None:
    assert roots("s") == {"s"}
    assert parents("s") == ()
    assert not is_joined("s")


@pytest.mark.parametrize("source", [Rest("s", 2), TokenRange("s", 1, None), BatchPart("s", "chunk", "(2,)", 0)])
def test_a_cut_has_the_root_of_its_parent(source: Source) -> None:
    assert parents(source) == ("s",)
    assert roots(Rest(source, 1)) == {"s"}
    assert not is_joined(source)


def test_a_concatenation_has_the_roots_of_its_operands() -> None:
    source = joined(Rest("s", 1), None, "t")
    assert parents(source) == (Rest("s", 1), "t")
    assert roots(source) == {"s", "t"}
    assert is_joined(source)
    assert is_joined(TokenRange(source, 0, 3))


def test_equal_sources_are_one_key() -> None:
    assert {Rest("s", 1): 0, Rest("s", 1): 1, TokenRange("s", 1, None): 2} == {
        Rest("s", 1): 1,
        TokenRange("s", 1, None): 2,
    }
    assert joined("s") != joined("s")


def test_labels_say_where_batch_and_tokens_stand() -> None:
    labels = seed((3, 5, 4), batch_dim=1, token_dim=0, source="s")
    assert (labels.batch_dim(), labels.token_dim()) == (1, 0)
    assert labels.token_sources() == ["s"]
    assert labels.without_dim(0).batch_dim() == 0
    assert not labels.with_dim(0, plain(3)).any_tokens()
    with pytest.raises(AxisError, match="without its batch"):
        Labels([(Factor(Axis("tokens", "s"), 5),)]).batch_dim()


def test_labels_of_several_results_are_told_from_those_of_one() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.zeros(3, 5)
    one = seed((3, 5), batch_dim=0, token_dim=1, source="s")
    labels = LabelMap({node: ResultLabels((one, one))})
    assert labels[node].any_tokens()
    assert labels[node].token_sources() == ["s", "s"]
    assert labels.tensor(node) is None
    labels[node] = one
    assert labels.tensor(node) is labels.of(node) is one
    with pytest.raises(TypeError, match="is not a tensor"):
        labels.of(3)
