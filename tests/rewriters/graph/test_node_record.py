"""What passes leave at nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import fx

from rewriters.graph.node_record import NodeRecord, record, rowwise_module, set_record


def test_a_node_without_a_record_has_the_defaults() -> None:
    node = fx.Graph().placeholder("x")
    assert record(node) == NodeRecord()
    with pytest.raises(AssertionError, match="x does not stand for a module"):
        rowwise_module(node)


def test_records_of_a_copied_graph_are_its_own() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    graph.output(node)
    set_record(node, replace(record(node), number=2.0))
    copied, env = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.graph_copy(graph, env)
    set_record(env[node], replace(record(env[node]), special_cut=True))
    assert record(env[node]) == NodeRecord(number=2.0, special_cut=True)
    assert record(node) == NodeRecord(number=2.0)
