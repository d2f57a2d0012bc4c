"""Repairs: what a rule asks for, carried out in a graph (side inputs aligned, lengths read, readouts remapped).

Start at :func:`align_operand` and :func:`remap_readout`; ``insert.py`` walks the graph and calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from madtp.tokens import segments as segment_runtime
from madtp.tokens import state as runtime
from rewriters.axes.arguments import items
from rewriters.axes.labels import Axis
from rewriters.axes.outcome import Align, RenamedArgument, Resize
from rewriters.axes.readouts import (
    BatchReadout,
    ConcatenationReadout,
    IndexReadout,
    LengthReadout,
    MaskedMeanReadout,
    PoolingReadout,
    PositionReadout,
    PrefixReadout,
    RangeReadout,
    RangesReadout,
    Readout,
    RejoinedReadout,
    RestReadout,
)
from rewriters.axes.sources import Source
from rewriters.graph.nodes import op_name, operand
from rewriters.insert.workspace import Insertion

aten = torch.ops.aten
END = 9223372036854775807


def rename_argument(node: fx.Node, renamed: RenamedArgument) -> None:
    """Pass a positional argument under another name."""
    node.update_kwarg(renamed.name, node.args[renamed.position])
    node.update_arg(renamed.position, None)


def align_operand(insertion: Insertion, node: fx.Node, align: Align) -> None:
    """Let ``node`` read a side input that is gathered along the tokens of its other operands."""
    present = (align.operand, insertion.aligned_for.get((node, align.operand)))
    side_input = next(a for a in node.all_input_nodes if a in present)
    wanted = replace(align, operand=side_input)
    if wanted not in insertion.aligned:
        insertion.aligned[wanted] = _gather(insertion, node, wanted)
    new = insertion.aligned[wanted]
    insertion.aligned_for[node, align.operand] = new
    node.replace_input_with(side_input, new)


def _gather(insertion: Insertion, node: fx.Node, align: Align) -> fx.Node:
    graph = insertion.graph
    places = (align.dim, align.batch_dim, align.rank, align.heads)
    state = insertion.state(align.axis.source, node)
    earlier = None if align.present is None else insertion.state(align.present.source, node)
    with graph.inserting_before(node):
        if earlier is None:
            new = graph.call_function(runtime.align, (align.operand, state, *places))
        else:
            new = graph.call_function(runtime.realign, (align.operand, earlier, state, *places))
    new.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
    return new


def pass_states(insertion: Insertion, node: fx.Node, states: Mapping[str, Axis]) -> None:
    """Give ``node`` the states of token axes under the names of its arguments."""
    for name, axis in states.items():
        node.update_kwarg(name, insertion.state(axis.source, node))


def resize_argument(insertion: Insertion, node: fx.Node, resize: Resize) -> None:
    """Replace a size that was baked in by the present length of a token axis."""
    sizes = list(items(node, resize.argument))
    sizes[resize.position] = -1 if resize.axis is None else length(insertion, resize.axis.source, node)
    node.update_arg(resize.argument, sizes)


def length(insertion: Insertion, source: Source, before: fx.Node) -> fx.Node:
    """The node that holds how many tokens ``source`` has now."""
    if source not in insertion.lengths:
        state = insertion.state(source, before)
        with insertion.graph.inserting_after(state):
            insertion.lengths[source] = insertion.graph.call_function(runtime.state_length, (state,))
    return insertion.lengths[source]


def remap_readout(insertion: Insertion, node: fx.Node, readout: Readout) -> fx.Node:
    """Remap a readout to the tokens that survive; return the node that replaces ``node``."""
    graph = insertion.graph
    # A prefix is protected, so it stands where it stood; parts of the batch and concatenations have states of their own.
    if isinstance(readout, (PrefixReadout, BatchReadout, ConcatenationReadout)):
        return node
    state = insertion.state(readout.axis.source, node)
    with graph.inserting_before(node):
        new = _remapped(graph, node, readout, state)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    insertion.replaced[node] = new
    graph.erase_node(node)
    return new


def _remapped(graph: fx.Graph, node: fx.Node, readout: Readout, state: fx.Node) -> fx.Node:
    if isinstance(readout, RejoinedReadout):
        arguments = (items(node, 0), state, readout.dim, readout.batch_dim, readout.starts)
        return graph.call_function(segment_runtime.rejoin, arguments)
    values, dim = operand(node, 0), readout.dim
    match readout:
        case PositionReadout(batch_dim=batch_dim, position=position):
            new = graph.call_function(runtime.read_position, (values, state, dim, batch_dim, position))
            return _keep_dim(graph, new, readout)
        case IndexReadout(batch_dim=batch_dim, index=index):
            new = graph.call_function(runtime.read_each, (values, state, dim, batch_dim, index))
            return _keep_dim(graph, new, readout)
        case RangeReadout(batch_dim=batch_dim, start=start, end=end):
            return graph.call_function(segment_runtime.cut_range, (values, state, dim, batch_dim, start, end))
        case RangesReadout(batch_dim=batch_dim, starts=starts):
            return graph.call_function(segment_runtime.cut_ranges, (values, state, dim, batch_dim, starts))
        case RestReadout(start=start):
            return graph.call_function(aten.slice.Tensor, (values, dim, start, END))
        case PoolingReadout(batch_dim=batch_dim):
            keepdim = node.meta["val"].dim() == values.meta["val"].dim()
            return graph.call_function(runtime.pool, (values, state, dim, batch_dim, op_name(node), keepdim))
        case MaskedMeanReadout(batch_dim=batch_dim):
            return graph.call_function(runtime.masked_mean, (*node.args, state, batch_dim))
        case LengthReadout():
            return graph.call_function(runtime.full_length, (state,))
    raise TypeError(f"{readout} is not remapped")


def _keep_dim(graph: fx.Graph, node: fx.Node, readout: PositionReadout | IndexReadout) -> fx.Node:
    return graph.call_function(aten.unsqueeze.default, (node, readout.dim)) if readout.keepdim else node
