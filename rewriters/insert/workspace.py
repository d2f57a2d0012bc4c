"""A graph under insertion: its sites, the labels of its nodes, token states, and what replaces what.

Start at :class:`Insertion`. ``insert.py`` fills it, ``restoration.py`` and ``lower/pricing.py`` read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import SymInt, fx

from madtp.tokens import segments as segment_runtime
from madtp.tokens import state as runtime
from madtp.tokens.cache_marks import MarkedAxes
from rewriters.axes.arguments import operand_list
from rewriters.axes.labels import Axis, LabelMap
from rewriters.axes.outcome import Align
from rewriters.axes.sources import BatchPart, Concatenation, Derived, Rest, Source, TokenRange, roots
from rewriters.graph.nodes import call_argument, example_shape, op_name
from rewriters.plan.plan import Plan

aten = torch.ops.aten
Size: TypeAlias = int | SymInt


class InsertRefusal(Exception):
    """A node downstream of some sites cannot be handled; ``sources`` are the sites whose tokens reach it."""

    def __init__(self, node: fx.Node, reason: str, sources: set[str]) -> None:
        super().__init__(f"{node.name}: {reason}")
        self.node, self.reason, self.sources = node, reason, sources


class Labelling(LabelMap):
    """Labels by node, with the lineage of token states.

    Attributes:
        parent: The state that each site prunes, where that is not the whole stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parent: dict[Source, Source] = {}

    def chain(self, source: Source) -> list[Source]:
        """``source`` and the states before it on its stream, latest first."""
        result = [source]
        while source in self.parent:
            source = self.parent[source]
            result.append(source)
        return result

    def sites_before(self, source: Source) -> set[str]:
        """All sites that prune the tokens of ``source``, those of concatenated streams too."""
        found: set[str] = set()
        waiting: list[Source] = list(roots(source))
        while waiting:
            for state in self.chain(waiting.pop()):
                if isinstance(state, Derived):
                    waiting.extend(roots(state))
                elif isinstance(state, str):
                    found.add(state)
        return found

    def sites_reaching(self, node: fx.Node) -> set[str]:
        """Names of the sites whose tokens reach ``node``."""
        found: set[str] = set()
        for operand in node.all_input_nodes:
            labels = self.get(operand)
            for source in labels.token_sources() if labels is not None else ():
                found |= self.sites_before(source)
        return found

    def newer(self, first: Axis, second: Axis) -> Axis | None:
        """The later of two states of one stream; None if they have nothing to do with each other."""
        if second.source in self.chain(first.source):
            return first
        return second if first.source in self.chain(second.source) else None


def site_key(name: str) -> str:
    """Name of a site as a module name."""
    return name.replace(".", "_").replace("#", "__")


@dataclass(frozen=True)
class InsertedSite:
    """The values around a site.

    Attributes:
        value: The residual value in front of it.
        state: The token state of that value; None where no token was dropped yet.
        block_input: The residual value at the input of its block.
    """

    value: fx.Node
    state: fx.Node | None
    block_input: fx.Node


@dataclass(frozen=True)
class BatchCut:
    """The result ``number`` of an operation that cuts or repeats the batch."""

    node: fx.Node
    number: int


@dataclass
class Insertion:
    """A graph with its sites in place.

    Attributes:
        graph: The graph, changed in place.
        plan: What is inserted.
        labels: Axis labels of the nodes, for the cost model too.
        states: The node of each token state, by source.
        sites: The values around each inserted site, by its name.
        site_values: Residual values in front of sites.
        statistics: What the attention of a site's block says about the tokens, by site.
        replaced: Nodes that replace others.
        aligned: Side inputs that are gathered along a state, by what was asked for.
        aligned_for: The gathered side input that a node reads in place of a captured operand, by node and operand.
        lengths: The node that holds the present length, by source.
        part_sizes: Sizes of the operands of concatenations along tokens.
        batch_cuts: The operations that cut the batch, by the source of what they give.
        segment_maps: The node that tells the segment of each token, by stream.
        output_sites: The site that has dropped image tokens of an output ``[B, N, C]`` last, by position of the output.
        marked: Outputs in the key/value cache that may lack tokens, by path in the object that holds them.
    """

    graph: fx.Graph
    plan: Plan
    labels: Labelling = field(default_factory=Labelling)
    states: dict[Source, fx.Node] = field(default_factory=dict)
    sites: dict[str, InsertedSite] = field(default_factory=dict)
    site_values: set[fx.Node] = field(default_factory=set)
    statistics: dict[str, fx.Node] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    aligned: dict[Align, fx.Node] = field(default_factory=dict)
    aligned_for: dict[tuple[fx.Node, fx.Node], fx.Node] = field(default_factory=dict)
    lengths: dict[Source, fx.Node] = field(default_factory=dict)
    part_sizes: dict[Concatenation, tuple[Size, ...]] = field(default_factory=dict)
    batch_cuts: dict[BatchPart, BatchCut] = field(default_factory=dict)
    segment_maps: dict[int, fx.Node] = field(default_factory=dict)
    output_sites: dict[int, str] = field(default_factory=dict)
    marked: dict[str, MarkedAxes] = field(default_factory=dict)

    def current(self, node: fx.Node) -> fx.Node:
        """The node that replaces ``node``, or itself."""
        return self.replaced.get(node, node)

    def state(self, source: Source, before: fx.Node) -> fx.Node:
        """The node that holds the token state of ``source``; derived states are computed where first needed."""
        if source not in self.states:
            if isinstance(source, Concatenation):
                self.states[source] = self._concatenated_state(source, before)
            else:
                self.states[source] = self._cut_state(source, before)
        return self.states[source]

    def _cut_state(self, source: Source, before: fx.Node) -> fx.Node:
        if not isinstance(source, (Rest, TokenRange, BatchPart)):
            raise KeyError(source)
        base = self.state(source.parent, before)
        with self.graph.inserting_before(before):
            if isinstance(source, Rest):
                return self.graph.call_function(runtime.suffix_state, (base, source.start))
            if isinstance(source, TokenRange):
                return self.graph.call_function(segment_runtime.range_state, (base, source.start, source.end))
            return self._part_state(base, self.batch_cuts[source])

    def _concatenated_state(self, source: Concatenation, before: fx.Node) -> fx.Node:
        operands = [n for n in operand_list(source.node, 0) if example_shape(n) != (0,)]
        dim = call_argument(source.node, 1, "dim", 0)
        self.part_sizes[source] = tuple(n.meta["val"].shape[dim] for n in operands)
        parts: list[fx.Node] = []
        for parent, operand in zip(source.parents, operands, strict=True):
            if parent is not None:
                parts.append(self.state(parent, before))
                continue
            with self.graph.inserting_before(before):
                parts.append(self.graph.call_function(aten.sym_size.int, (operand, dim)))
        with self.graph.inserting_before(before):
            return self.graph.call_function(segment_runtime.join_states, (parts,))

    def _part_state(self, base: fx.Node, cut: BatchCut) -> fx.Node:
        node, name = cut.node, op_name(cut.node)
        if name == "chunk":
            return self.graph.call_function(runtime.batch_chunk, (base, node.args[1], cut.number))
        if name == "slice":
            start, end = (node.args[i] if len(node.args) > i else None for i in (2, 3))
            return self.graph.call_function(runtime.batch_slice, (base, start, end))
        if name == "repeat_interleave":
            return self.graph.call_function(runtime.batch_repeat, (base, node.args[1]))
        return self.graph.call_function(runtime.batch_split, (base, node.args[1], cut.number))
