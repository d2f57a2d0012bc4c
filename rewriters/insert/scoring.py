"""Scoring: the attention of a site's block becomes the site's own, which tells it how much attention each token gets.

Start at :func:`insert_attention`; :func:`insert_windows` is for attention in windows of the grid, which runs on all tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from madtp.sites.scoring import grid_attention
from madtp.tokens import segments as segment_runtime
from madtp.tokens import state as runtime
from rewriters.axes.grid import Moves
from rewriters.axes.labels import Axis, any_tokens, token_axis
from rewriters.axes.outcome import Outcome, labels_of
from rewriters.axes.propagate import runs_along
from rewriters.axes.table import apply
from rewriters.graph.nodes import AxisError, op_name
from rewriters.insert.grid_excursions import Excursions
from rewriters.insert.repairs import align_operand, rename
from rewriters.insert.workspace import Insertion, InsertRefusal, site_key
from rewriters.plan.plan import SitePlan

aten = torch.ops.aten
SITES = "madtp.sites"


def insert_attention(done: Insertion, node: fx.Node, site: SitePlan, readouts: tuple[fx.Node, ...]) -> None:
    """Put the site's attention in the place of ``node``, or its eye beside an attention map that keeps its spelling."""
    outcome: Outcome | None = None
    if runs_along(node, done.labels):
        try:
            outcome = apply(node, done.labels)
        except AxisError as error:
            raise InsertRefusal(node, str(error), done.labels.sites_reaching(node)) from error
        if _differ(node, outcome.states):
            raise InsertRefusal(node, "queries and keys are at different sites", done.labels.sites_reaching(node))
    state = None
    for align in outcome.aligns if outcome is not None else ():
        align_operand(done, node, align)
    if outcome is not None and outcome.renamed is not None:
        rename(node, *outcome.renamed)
    if outcome is not None and outcome.states:
        state = done.state(next(iter(outcome.states.values())).source, node)
    segments = _segments(done, site, node)
    if op_name(node) == "weigh":
        return _look_at_map(done, node, site, outcome, {"state": state, "readouts": readouts, "segments": segments})
    options = {
        "scale": node.kwargs.get("scale"),
        "grouped": node.kwargs.get("grouped", False),
        "softcap": node.kwargs.get("softcap"),
        "present_mask": node.kwargs.get("present_mask"),
        "state": state,
        "readouts": readouts,
        "segments": segments,
    }
    labels = None if outcome is None else outcome.labels
    output = _replace(done, node, site, "attention", options)
    if labels is not None and any_tokens(labels):
        done.labels[output] = labels


def _differ(node: fx.Node, states: Mapping[str, Axis]) -> bool:
    """Whether queries and keys are not at the same site."""
    sources = {axis.source for axis in states.values()}
    return len(sources) > 1 or (op_name(node) == "attention" and len(states) == 1)


def _look_at_map(
    done: Insertion, node: fx.Node, site: SitePlan, outcome: Outcome | None, operands: dict[str, Any]
) -> None:
    weights: Any = node.args[0]
    while op_name(weights) == "dropout":
        weights = weights.args[0]
    if operands["state"] is not None:
        node.kwargs = {"state": operands["state"]}
    with done.graph.inserting_after(node):
        seen = done.graph.call_module(f"{SITES}.{site_key(site.name)}.map", (weights, node), operands)
    seen.meta = {k: v for k, v in node.meta.items() if k != "val"}
    if outcome is not None and outcome.labels is not None:
        done.labels[node] = outcome.labels
    done.site_inputs[site.name] = seen


def insert_windows(done: Insertion, node: fx.Node, site: SitePlan, state: Any, excursions: Excursions) -> None:
    """The attention of a site in windows of the grid.

    Args:
        state: the state that the block's input is along, None where the stream was not pruned yet.
        excursions: tells which keys are alive.
    Raises:
        AxisError: that cannot be told.
    """
    if runs_along(node, done.labels):
        raise AxisError("windows of a grid of which tokens are missing")
    visible = None if state is None else excursions.visible(node, state)
    excursions.hidden.add(node)
    options = {
        "scale": node.kwargs.get("scale"),
        "grouped": node.kwargs.get("grouped", False),
        "softcap": node.kwargs.get("softcap"),
        "visible": visible,
    }
    _replace(done, node, site, "windows", options)


def _replace(done: Insertion, node: fx.Node, site: SitePlan, child: str, options: dict[str, Any]) -> fx.Node:
    """Put the site's own attention, its ``child``, in the place of ``node``; returns its output."""
    arguments = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])
    with done.graph.inserting_before(node):
        call = done.graph.call_module(f"{SITES}.{site_key(site.name)}.{child}", arguments, options)
        output = done.graph.call_function(operator.getitem, (call, 0))
        done.site_inputs[site.name] = done.graph.call_function(operator.getitem, (call, 1))
    output.meta = dict(node.meta)
    call.meta = {k: v for k, v in node.meta.items() if k != "val"}
    call.meta["attention"] = node.args[:3]
    call.meta["attention_labels"] = tuple(labels_of(n, done.labels) for n in node.args[:3])
    node.replace_all_uses_with(output)
    done.replaced[node] = output
    done.graph.erase_node(node)
    return output


def seen_at(
    done: Insertion, site: SitePlan, tokens: fx.Node, state: fx.Node | None, way: Moves | None, excursions: Excursions
) -> fx.Node:
    """What a site knows of its block's attention, at the graph's insertion point.

    Args:
        tokens: ``[B, N, C]``. state: of them. way: from windows back to the tokens of the grid.
    """
    if site.scores == "attention":
        return done.site_inputs[site.name]
    received = None
    if site.scores == "windows" and way is not None:
        received = excursions.carry(way, done.site_inputs[site.name])
    return done.graph.call_function(grid_attention, (tokens, received, state, (site.batch_dim, site.token_dim)))


def _segments(done: Insertion, site: SitePlan, before: fx.Node) -> fx.Node | None:
    """The node that tells which token is of which segment, made once a stream; None where all are of one."""
    if not site.segments or site.stream in done.segment_maps:
        return done.segment_maps.get(site.stream)
    nodes = {n.name: done.replaced.get(n, n) for n in (*done.replaced, *done.graph.nodes)}
    with done.graph.inserting_before(before):
        if site.mask is not None:
            made = done.graph.call_function(segment_runtime.scattered_segments, (nodes[site.mask],))
        else:
            lengths = [_part_length(done, nodes[p.node], p.dim, before) for p in site.parts]
            numbers, special = [p.segment for p in site.parts], [p.special for p in site.parts]
            arguments = (lengths, numbers, special, before.args[0])
            made = done.graph.call_function(segment_runtime.concatenated_segments, arguments)
    done.segment_maps[site.stream] = made
    return made


def _part_length(done: Insertion, node: fx.Node, dim: int, before: fx.Node) -> fx.Node:
    """Original tokens of a part of a concatenation."""
    labels = done.labels.get(node)
    axis = None if labels is None else token_axis(labels[dim])
    if axis is None:
        return done.graph.call_function(aten.sym_size.int, (node, dim))
    return done.graph.call_function(runtime.full_length, (done.state(axis.source, before),))
