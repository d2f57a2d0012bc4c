"""Repairs: what a rule asks for, carried out in a graph (side inputs aligned, lengths read, readouts remapped).

Start at :func:`align_operand` and :func:`read_out`; ``insert.py`` walks the graph and calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from madtp.tokens import segments as segment_runtime
from madtp.tokens import state as runtime
from rewriters.axes.outcome import Align, Readout
from rewriters.graph.nodes import op_name
from rewriters.insert.workspace import Insertion

aten = torch.ops.aten
END = 9223372036854775807


def rename(node: fx.Node, position: int, name: str) -> None:
    """Pass a positional argument under another name."""
    node.update_kwarg(name, node.args[position])
    node.update_arg(position, None)


def align_operand(done: Insertion, node: fx.Node, align: Align) -> None:
    operand = next(
        a for a in node.all_input_nodes if a is align.operand or done.aligned.get(("of", node, align.operand)) is a
    )
    places = (align.dim, align.batch_dim, align.rank, align.heads)
    key = (operand, align.axis, align.present, *places)
    if key not in done.aligned:
        state = done.state(align.axis.source, node)
        before = None if align.present is None else done.state(align.present.source, node)
        with done.graph.inserting_before(node):
            if before is None:
                new = done.graph.call_function(runtime.align, (operand, state, *places))
            else:
                new = done.graph.call_function(runtime.realign, (operand, before, state, *places))
        new.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
        done.aligned[key] = new
    done.aligned[("of", node, align.operand)] = done.aligned[key]
    node.replace_input_with(operand, done.aligned[key])


def length(done: Insertion, source: Any, before: fx.Node) -> fx.Node:
    if source not in done.lengths:
        state = done.state(source, before)
        with done.graph.inserting_after(state):
            done.lengths[source] = done.graph.call_function(runtime.state_length, (state,))
    return done.lengths[source]


def read_out(done: Insertion, node: fx.Node, readout: Readout) -> fx.Node:
    """Remap a readout; returns the node that replaces ``node``."""
    graph, kind = done.graph, readout.kind
    if kind in ("prefix", "batch", "join"):
        return node
    state = done.state(readout.axis.source, node)
    values = node.args[0]
    with graph.inserting_before(node):
        if kind == "position":
            new = graph.call_function(
                runtime.read_position, (values, state, readout.dim, readout.batch_dim, readout.position)
            )
            if readout.keepdim:
                new = graph.call_function(aten.unsqueeze.default, (new, readout.dim))
        elif kind == "range":
            places = (values, state, readout.dim, readout.batch_dim, *readout.bounds)
            new = graph.call_function(segment_runtime.cut_range, places)
        elif kind == "cuts":
            places = (values, state, readout.dim, readout.batch_dim, readout.bounds)
            new = graph.call_function(segment_runtime.cut_ranges, places)
        elif kind == "rest":
            new = graph.call_function(aten.slice.Tensor, (values, readout.dim, readout.position, END))
        elif kind == "index":
            places = (values, state, readout.dim, readout.batch_dim, readout.index)
            new = graph.call_function(runtime.read_each, places)
            if readout.keepdim:
                new = graph.call_function(aten.unsqueeze.default, (new, readout.dim))
        elif kind == "pool":
            keepdim = node.meta["val"].dim() == values.meta["val"].dim()  # type: ignore[union-attr]
            new = graph.call_function(
                runtime.pool, (values, state, readout.dim, readout.batch_dim, op_name(node), keepdim)
            )
        elif kind == "masked_mean":
            new = graph.call_function(runtime.masked_mean, (*node.args, state, readout.batch_dim))
        else:
            new = graph.call_function(runtime.full_length, (state,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    done.replaced[node] = new
    graph.erase_node(node)
    return new
