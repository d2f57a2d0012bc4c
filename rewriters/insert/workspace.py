"""What insertion has done so far: the graph, labels of its nodes, token states and what was replaced.

Start at :class:`Insertion`. ``insert.py`` fills it, ``restoration.py`` and ``lower/pricing.py`` read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from madtp.tokens import segments as segment_runtime
from madtp.tokens import state as runtime
from madtp.tokens.cache_marks import MarkedAxes
from rewriters.axes.labels import Axis, Dim, Factor, axes_of, roots
from rewriters.graph.nodes import is_tensor, op_name
from rewriters.plan.plan import Plan

aten = torch.ops.aten


class InsertRefusal(Exception):
    """A node downstream of some sites cannot be handled; ``sources`` are the sites whose tokens reach it."""

    def __init__(self, node: fx.Node, reason: str, sources: set[str]) -> None:
        super().__init__(f"{node.name}: {reason}")
        self.node, self.reason, self.sources = node, reason, sources


class Labelling(dict[fx.Node, Any]):
    """Labels by node, with the lineage of states: which site follows which on a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.parent: dict[Any, Any] = {}

    def chain(self, source: Any) -> list[Any]:
        """``source`` and the sites before it on its stream, latest first."""
        result = [source]
        while source in self.parent:
            source = self.parent[source]
            result.append(source)
        return result

    def sites_before(self, source: Any) -> set[Any]:
        """All sites that pruned the tokens of ``source``, those of concatenated streams too."""
        found: set[Any] = set()
        waiting = list(roots(source))
        while waiting:
            for one in self.chain(waiting.pop()):
                if isinstance(one, tuple):
                    waiting.extend(roots(one))
                else:
                    found.add(one)
        return found

    def sites_reaching(self, node: fx.Node) -> set[Any]:
        """Names of the sites whose tokens reach ``node``."""
        found: set[Any] = set()
        for operand in node.all_input_nodes:
            for dim in _dims(self.get(operand)):
                for axis in axes_of(dim):
                    if axis.kind == "tokens":
                        found |= self.sites_before(axis.source)
        return found

    def newer(self, first: Axis, second: Axis) -> Axis | None:
        """The later of two states of one stream; None if they have nothing to do with each other."""
        if second.source in self.chain(first.source):
            return first
        return second if first.source in self.chain(second.source) else None


def _dims(labels: Any) -> list[Dim]:
    """The labels of all dimensions of a value, of several results one after the other."""
    if not labels:
        return []
    if labels[0] and isinstance(labels[0][0], tuple) and not isinstance(labels[0][0], Factor):
        return [dim for one in labels for dim in one]
    return list(labels)


def site_key(name: str) -> str:
    """Name of a site as a module name."""
    return name.replace(".", "_").replace("#", "__")


@dataclass
class Insertion:
    """A graph with its sites in place.

    Attributes:
        labels: axis labels of the finished graph, for the cost model.
        states: node of each token state, by source.
        before_site: residual value in front of each site and its state. site_values: these values.
        entrances: residual value at the block's input.
        attention_of: site by the node of its scoring attention.
        marked: outputs that later calls read again and that may lack tokens, by path in the object that holds them.
    """

    graph: fx.Graph
    plan: Plan
    labels: Labelling = field(default_factory=Labelling)
    states: dict[Any, fx.Node] = field(default_factory=dict)
    before_site: dict[str, tuple[fx.Node, fx.Node | None]] = field(default_factory=dict)
    site_values: set[fx.Node] = field(default_factory=set)
    entrances: dict[str, fx.Node] = field(default_factory=dict)
    derived: dict[Any, tuple[fx.Node, int]] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    aligned: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)
    lengths: dict[Any, fx.Node] = field(default_factory=dict)
    joined: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    site_inputs: dict[str, fx.Node] = field(default_factory=dict)
    segment_maps: dict[int, fx.Node] = field(default_factory=dict)
    marked: dict[str, MarkedAxes] = field(default_factory=dict)

    def state(self, source: Any, before: fx.Node) -> fx.Node:
        """The node that holds the token state of ``source``; derived states are computed where first needed."""
        if source not in self.states:
            parent, kind, *_ = source
            if kind == "join":
                self.states[source] = self._joined(source, before)
                return self.states[source]
            base = self.state(parent, before)
            with self.graph.inserting_before(before):
                if kind == "rest":
                    self.states[source] = self.graph.call_function(runtime.suffix_state, (base, source[2]))
                elif kind == "range":
                    self.states[source] = self.graph.call_function(segment_runtime.range_state, (base, *source[2:]))
                else:
                    self.states[source] = self._part(base, *self.derived[source])
        return self.states[source]

    def _joined(self, source: Any, before: fx.Node) -> fx.Node:
        parents, _, node = source
        operands = [n for n in node.args[0] if is_tensor(n) and n.meta["val"].shape != (0,)]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        self.joined[source] = tuple(n.meta["val"].shape[dim] for n in operands)
        parts: list[fx.Node] = []
        for parent, operand in zip(parents, operands, strict=True):
            if parent is not None:
                parts.append(self.state(parent, before))
                continue
            with self.graph.inserting_before(before):
                parts.append(self.graph.call_function(aten.sym_size.int, (operand, dim)))
        with self.graph.inserting_before(before):
            return self.graph.call_function(segment_runtime.join_states, (parts,))

    def _part(self, base: fx.Node, node: fx.Node, part: int) -> fx.Node:
        name = op_name(node)
        if name == "chunk":
            return self.graph.call_function(runtime.batch_chunk, (base, node.args[1], part))
        if name == "slice":
            start, end = (node.args[i] if len(node.args) > i else None for i in (2, 3))
            return self.graph.call_function(runtime.batch_slice, (base, start, end))
        if name == "repeat_interleave":
            return self.graph.call_function(runtime.batch_repeat, (base, node.args[1]))
        return self.graph.call_function(runtime.batch_split, (base, node.args[1], part))
