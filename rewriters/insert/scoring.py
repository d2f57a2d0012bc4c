"""Scoring: replace the attention of a site's block by the site's own, which measures how much attention each token gets.

Start at :func:`insert_attention`; :func:`insert_windows` is for attention in windows of the grid, which runs on all tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.node import Argument

from madtp.sites.scoring import grid_attention
from madtp.tokens import segments as segment_runtime
from madtp.tokens import state as runtime
from rewriters.axes.labels import Axis, token_axis
from rewriters.axes.outcome import Outcome
from rewriters.axes.propagate import runs_along
from rewriters.axes.sources import Source
from rewriters.axes.table import apply
from rewriters.axes.token_moves import TokenMoves
from rewriters.graph.node_record import record, set_record
from rewriters.graph.nodes import AxisError, op_name, operand
from rewriters.insert.dense_sections import DenseSections
from rewriters.insert.repairs import align_operand, rename_argument
from rewriters.insert.workspace import Insertion, InsertRefusal, site_key
from rewriters.plan.plan import SitePlan

aten = torch.ops.aten
SITES = "madtp.sites"


@dataclass(frozen=True)
class ScoringOperands:
    """Operands about the tokens that the attention of a site receives.

    Attributes:
        state: Their state; None where no token was dropped yet.
        readouts: Positions that the model reads.
        segments: Which token is of which segment; None where all are of one.
    """

    state: fx.Node | None
    readouts: tuple[fx.Node, ...]
    segments: fx.Node | None

    def keywords(self) -> dict[str, Argument]:
        """The operands by the names of the arguments."""
        return {"state": self.state, "readouts": self.readouts, "segments": self.segments}


def insert_attention(insertion: Insertion, node: fx.Node, site: SitePlan, readouts: tuple[fx.Node, ...]) -> None:
    """Replace ``node`` by the site's attention; an attention map that keeps its spelling is observed instead."""
    outcome = Outcome()
    if runs_along(node, insertion.labels):
        try:
            outcome = apply(node, insertion.labels)
        except AxisError as error:
            raise InsertRefusal(node, str(error), insertion.labels.sites_reaching(node)) from error
        if _differ(node, outcome.states):
            reason = "queries and keys are at different sites"
            raise InsertRefusal(node, reason, insertion.labels.sites_reaching(node))
    for align in outcome.aligns:
        align_operand(insertion, node, align)
    if outcome.renamed is not None:
        rename_argument(node, outcome.renamed)
    axis = next(iter(outcome.states.values()), None)
    state = None if axis is None else insertion.state(axis.source, node)
    operands = ScoringOperands(state, readouts, _segments(insertion, site, node))
    if op_name(node) == "weigh":
        _observe_map(insertion, node, site, operands)
        if outcome.labels is not None:
            insertion.labels[node] = outcome.labels
        return
    options = {
        "scale": node.kwargs.get("scale"),
        "grouped": node.kwargs.get("grouped", False),
        "softcap": node.kwargs.get("softcap"),
        "windows": node.kwargs.get("windows"),
        "present_mask": node.kwargs.get("present_mask"),
        **operands.keywords(),
    }
    output = _replace(insertion, node, site, child="attention", options=options)
    if outcome.labels is not None and outcome.labels.any_tokens():
        insertion.labels[output] = outcome.labels


def _differ(node: fx.Node, states: Mapping[str, Axis]) -> bool:
    """Whether queries and keys are not at the same site."""
    sources = {axis.source for axis in states.values()}
    return len(sources) > 1 or (op_name(node) == "attention" and len(states) == 1)


def _observe_map(insertion: Insertion, node: fx.Node, site: SitePlan, operands: ScoringOperands) -> None:
    weights = operand(node, 0)
    while op_name(weights) == "dropout":
        weights = operand(weights, 0)
    if operands.state is not None:
        node.kwargs = {"state": operands.state}
    with insertion.graph.inserting_after(node):
        statistics = insertion.graph.call_module(
            f"{SITES}.{site_key(site.name)}.map", (weights, node), operands.keywords()
        )
    statistics.meta = {k: v for k, v in node.meta.items() if k != "val"}
    insertion.statistics[site.name] = statistics


def insert_windows(
    insertion: Insertion, node: fx.Node, site: SitePlan, *, source: Source | None, sections: DenseSections
) -> None:
    """Replace ``node``, attention in windows of the grid, by the site's attention.

    Args:
        insertion: The graph.
        node: The attention.
        site: The site.
        source: The state of the block's input; None where no token was dropped yet.
        sections: Tells which keys are alive.

    Raises:
        AxisError: It is not known which keys are alive.
    """
    if runs_along(node, insertion.labels):
        raise AxisError("windows of a grid of which tokens are missing")
    visible = None if source is None else sections.alive_keys(node, source)
    sections.handled.add(node)
    options = {
        "scale": node.kwargs.get("scale"),
        "grouped": node.kwargs.get("grouped", False),
        "softcap": node.kwargs.get("softcap"),
        "visible": visible,
    }
    _replace(insertion, node, site, child="windows", options=options)


def _replace(
    insertion: Insertion, node: fx.Node, site: SitePlan, *, child: str, options: dict[str, Argument]
) -> fx.Node:
    """Put the site's own attention, its ``child``, in the place of ``node``; returns its output."""
    arguments = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])
    with insertion.graph.inserting_before(node):
        call = insertion.graph.call_module(f"{SITES}.{site_key(site.name)}.{child}", arguments, options)
        output = insertion.graph.call_function(operator.getitem, (call, 0))
        insertion.statistics[site.name] = insertion.graph.call_function(operator.getitem, (call, 1))
    output.meta = dict(node.meta)
    call.meta = {k: v for k, v in node.meta.items() if k != "val"}
    set_record(call, replace(record(call), site_attention=True))
    node.replace_all_uses_with(output)
    insertion.replaced[node] = output
    insertion.graph.erase_node(node)
    return output


def attention_statistics(
    insertion: Insertion,
    site: SitePlan,
    *,
    state: fx.Node | None,
    moves: TokenMoves | None,
    sections: DenseSections,
) -> fx.Node:
    """What a site knows of its block's attention, at the graph's insertion point.

    Args:
        insertion: The graph.
        site: The site.
        state: State of its tokens; None where no token was dropped yet.
        moves: How numbers get from windows back to the tokens of the grid.
        sections: What runs on all tokens.
    """
    if site.scores == "attention":
        return insertion.statistics[site.name]
    received = None
    if site.scores == "windows" and moves is not None:
        received = sections.move(insertion.statistics[site.name], moves)
    return insertion.graph.call_function(grid_attention, (received, state, (site.batch_dim, site.token_dim)))


def _segments(insertion: Insertion, site: SitePlan, before: fx.Node) -> fx.Node | None:
    """The node that tells which token is of which segment, made once a stream; None where all are of one."""
    if not site.segments or site.stream in insertion.segment_maps:
        return insertion.segment_maps.get(site.stream)
    nodes = {n.name: insertion.current(n) for n in (*insertion.replaced, *insertion.graph.nodes)}
    with insertion.graph.inserting_before(before):
        if site.mask is not None:
            made = insertion.graph.call_function(segment_runtime.scattered_segments, (nodes[site.mask],))
        else:
            lengths = [_part_length(insertion, nodes[p.node], p.dim, before) for p in site.parts]
            numbers, special = [p.segment for p in site.parts], [p.special for p in site.parts]
            arguments = (lengths, numbers, special, before.args[0])
            made = insertion.graph.call_function(segment_runtime.concatenated_segments, arguments)
    insertion.segment_maps[site.stream] = made
    return made


def _part_length(insertion: Insertion, node: fx.Node, dim: int, before: fx.Node) -> fx.Node:
    """Original tokens of a part of a concatenation."""
    labels = insertion.labels.tensor(node)
    axis = None if labels is None else token_axis(labels[dim])
    if axis is None:
        return insertion.graph.call_function(aten.sym_size.int, (node, dim))
    return insertion.graph.call_function(runtime.full_length, (insertion.state(axis.source, before),))
