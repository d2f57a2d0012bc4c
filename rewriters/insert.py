"""Insert: put the sites of a plan into a graph and repair everything downstream.

Start at :func:`insert`. The graph is walked once in order. Each operation that runs along a pruned token axis is put
to the rule table (``rules.py``); the outcome's repairs are carried out: side inputs are aligned, baked-in lengths
replaced, readouts remapped. Where every position is needed, tokens are scattered back (``restoration.py``). The stage
decides nothing; what it cannot do it refuses with :class:`InsertRefusal`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from madtp import segments as segment_runtime
from madtp import state as runtime
from madtp.marks import MarkedAxes, placed
from rewriters.axes import AxisError, Labels, any_tokens, token_axis
from rewriters.detect import seed
from rewriters.functional import has_effect
from rewriters.insertion import Insertion, InsertRefusal, site_key
from rewriters.outcomes import Align, Outcome, Readout, batch_dim_of, labels_of, op_name
from rewriters.plan import Plan, SitePlan
from rewriters.propagate import runs_along
from rewriters.restoration import Restoration
from rewriters.rules import apply

aten = torch.ops.aten
SITES = "madtp.sites"
END = 9223372036854775807


def insert(graph: fx.Graph, plan: Plan) -> Insertion:
    """Insert all sites of ``plan`` into ``graph``, in place.

    Raises:
        InsertRefusal: an operation downstream of a site has no rule and its tokens go on to later attention.
    """
    done = Insertion(graph, plan)
    by_name = {n.name: n for n in graph.nodes}
    at_attention = {by_name[s.attention]: s for s in plan.sites}
    at_value = {by_name[s.value]: s for s in plan.sites}
    readouts = {name: _position(graph, name, by_name) for s in plan.sites for name in s.readouts}
    nodes = {s.name: (by_name[s.block_input], tuple(readouts[r] for r in s.readouts)) for s in plan.sites}
    restoration = Restoration(done, post_norm=frozenset(s.name for s in plan.sites if s.norm == "post"))
    _hoist_readouts(graph, [(by_name[s.attention], nodes[s.name][1], s.name) for s in plan.sites])
    for node in list(graph.nodes):
        restoration.remember(node)
        try:
            if node in at_attention:
                restoration.check(node)
                _insert_attention(done, node, at_attention[node], nodes[at_attention[node].name][1])
            elif node.op == "output":
                _finish(done, node, restoration)
            else:
                current = _carry(done, node, restoration) if runs_along(node, done.labels) else node
                if node in at_value:
                    _insert_site(done, current, at_value[node], nodes[at_value[node].name])
        except AxisError as error:
            raise InsertRefusal(node, str(error), done.labels.sites_reaching(node)) from error
        restoration.pass_on(node)
    # What only an output read is computed for all tokens now, and its copy over the survivors is dead.
    graph.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output", "call_module") or has_effect(n)
    )
    graph.lint()
    return done


def _position(graph: fx.Graph, name: str, by_name: dict[str, fx.Node]) -> fx.Node:
    """The node of a readout position: "node", or "node+3" for three tokens behind it."""
    base, _, offset = name.partition("+")
    if not offset:
        return by_name[base]
    with graph.inserting_after(by_name[base]):
        return graph.call_function(operator.add, (by_name[base], int(offset)))


def _hoist_readouts(graph: fx.Graph, wanted: list[tuple[fx.Node, tuple[fx.Node, ...], str]]) -> None:
    """Move the computation of readout positions in front of the sites that protect them."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    first: dict[fx.Node, fx.Node] = {}
    for attention, readouts, _ in wanted:
        for readout in readouts:
            if readout not in first or order[attention] < order[first[readout]]:
                first[readout] = attention
    # What several readouts are computed from moves with the last of these steps, in front of the earliest site.
    for readout, attention in sorted(first.items(), key=lambda item: -order[item[1]]):
        late: set[fx.Node] = set()
        stack = [readout]
        while stack:
            node = stack.pop()
            if node in late or order[node] < order[attention] or node.op == "placeholder":
                continue
            if node is attention:
                reason = "a position that is read is computed from the tokens themselves"
                raise InsertRefusal(readout, reason, {s for a, r, s in wanted if readout in r})
            late.add(node)
            stack.extend(node.all_input_nodes)
        for node in sorted(late, key=order.__getitem__):
            attention.prepend(node)


def _insert_attention(done: Insertion, node: fx.Node, site: SitePlan, readouts: tuple[fx.Node, ...]) -> None:
    """Put the site's attention in the place of ``node``, or its eye beside an attention map that keeps its spelling."""
    graph = done.graph
    outcome: Outcome | None = None
    if runs_along(node, done.labels):
        try:
            outcome = apply(node, done.labels)
        except AxisError as error:
            raise InsertRefusal(node, str(error), done.labels.sites_reaching(node)) from error
        if len({a.source for a in outcome.states.values()}) > 1:
            raise InsertRefusal(node, "queries and keys are at different sites", done.labels.sites_reaching(node))
    state = None
    for align in outcome.aligns if outcome is not None else ():
        _align(done, node, align)
    if outcome is not None and outcome.renamed is not None:
        _rename(node, *outcome.renamed)
    if outcome is not None and outcome.states:
        state = done.state(next(iter(outcome.states.values())).source, node)
    segments = _segments(done, site, node)
    if op_name(node) == "weigh":
        return _look_at_map(done, node, site, outcome, {"state": state, "readouts": readouts, "segments": segments})
    arguments = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])
    with graph.inserting_before(node):
        call = graph.call_module(
            f"{SITES}.{site_key(site.name)}.attention",
            arguments,
            {
                "scale": node.kwargs.get("scale"),
                "grouped": node.kwargs.get("grouped", False),
                "softcap": node.kwargs.get("softcap"),
                "present_mask": node.kwargs.get("present_mask"),
                "state": state,
                "readouts": readouts,
                "segments": segments,
            },
        )
        output = graph.call_function(operator.getitem, (call, 0))
        seen = graph.call_function(operator.getitem, (call, 1))
    output.meta = dict(node.meta)
    call.meta = {k: v for k, v in node.meta.items() if k != "val"}
    call.meta["attention"] = node.args[:3]
    call.meta["attention_labels"] = tuple(labels_of(n, done.labels) for n in node.args[:3])
    if outcome is not None and outcome.labels is not None and any_tokens(outcome.labels):
        done.labels[output] = outcome.labels
    node.replace_all_uses_with(output)
    done.replaced[node] = output
    done.site_inputs[site.name] = seen
    graph.erase_node(node)


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


def _segments(done: Insertion, site: SitePlan, before: fx.Node) -> fx.Node | None:
    """The node that tells which token is of which segment, made once a stream; None where all are of one."""
    if not site.segments or site.stream in done.segment_maps:
        return done.segment_maps.get(site.stream)
    nodes = {n.name: done.replaced.get(n, n) for n in (*done.replaced, *done.graph.nodes)}
    with done.graph.inserting_before(before):
        if site.mask is not None:
            made = done.graph.call_function(segment_runtime.scattered, (nodes[site.mask],))
        else:
            lengths = [_part_length(done, nodes[p.node], p.dim, before) for p in site.parts]
            numbers, special = [p.segment for p in site.parts], [p.special for p in site.parts]
            arguments = (lengths, numbers, special, before.args[0])
            made = done.graph.call_function(segment_runtime.concatenated, arguments)
    done.segment_maps[site.stream] = made
    return made


def _part_length(done: Insertion, node: fx.Node, dim: int, before: fx.Node) -> fx.Node:
    """Original tokens of a part of a concatenation."""
    labels = done.labels.get(node)
    axis = None if labels is None else token_axis(labels[dim])
    if axis is None:
        return done.graph.call_function(aten.sym_size.int, (node, dim))
    return done.graph.call_function(runtime.full_length, (done.state(axis.source, before),))


def _insert_site(done: Insertion, value: fx.Node, site: SitePlan, inputs: tuple[fx.Node, tuple[fx.Node, ...]]) -> None:
    graph = done.graph
    block_input, readouts = inputs
    block_input = done.replaced.get(block_input, block_input)
    labels = done.labels.get(value)
    previous = token_axis(labels[site.token_dim]) if labels is not None else None
    known = done.labels.get(block_input)
    if (token_axis(known[site.token_dim]) if known is not None else None) != previous:
        raise InsertRefusal(
            value, "the block's input and output are at different sites", done.labels.sites_reaching(value)
        )
    users = list(value.users)
    after = value.next
    state = None if previous is None else done.state(previous.source, after)
    with graph.inserting_before(after):
        tokens, source = value, block_input
        if site.token_dim != 1:
            tokens = graph.call_function(aten.transpose.int, (tokens, site.token_dim, 1))
            source = graph.call_function(aten.transpose.int, (source, site.token_dim, 1))
        call = graph.call_module(
            f"{SITES}.{site_key(site.name)}",
            (tokens, source, done.site_inputs[site.name], state, readouts, done.segment_maps.get(site.stream)),
        )
        pruned = graph.call_function(operator.getitem, (call, 0))
        new_state = graph.call_function(operator.getitem, (call, 1))
        if site.token_dim != 1:
            pruned = graph.call_function(aten.transpose.int, (pruned, site.token_dim, 1))
    call.meta["nn_module_stack"] = value.meta.get("nn_module_stack", {})
    call.meta["site_input"] = (source, labels_of(block_input, done.labels), block_input)
    pruned.meta = {"val": value.meta["val"], "nn_module_stack": value.meta.get("nn_module_stack", {})}
    for user in users:
        user.replace_input_with(value, pruned)
    shape = tuple(sum((f.size for f in d), 0) if len(d) == 1 else 0 for d in labels_of(value, done.labels))
    done.labels[pruned] = seed(shape, site.batch_dim, site.token_dim, site.name)
    done.states[site.name] = new_state
    done.replaced[value] = pruned
    done.before_site[site.name] = (value, state)
    done.site_values.add(value)
    done.entrances[site.name] = block_input
    if previous is not None:
        done.labels.parent[site.name] = previous.source


def _carry(done: Insertion, node: fx.Node, restoration: Restoration) -> fx.Node:
    """Apply the rule of ``node`` and carry its repairs out; returns the node that now stands for it."""
    try:
        outcome = apply(node, done.labels)
    except AxisError as error:
        restoration.before(node, str(error))
        return node
    restoration.check(node)
    for align in outcome.aligns:
        _align(done, node, align)
    if outcome.renamed is not None:
        _rename(node, *outcome.renamed)
    for name, axis in outcome.states.items():
        node.kwargs = {**node.kwargs, name: done.state(axis.source, node)}
    for resize in outcome.resizes:
        sizes = list(node.args[resize.argument])  # type: ignore[arg-type]
        sizes[resize.position] = -1 if resize.axis is None else _length(done, resize.axis.source, node)
        node.update_arg(resize.argument, sizes)
    result = _read_out(done, node, outcome.readout) if outcome.readout is not None else node
    if outcome.results is not None:
        done.labels[result] = outcome.results
        if outcome.readout is not None and outcome.readout.kind == "batch":
            for part, labels in enumerate(outcome.results):
                done.derived[labels[outcome.readout.dim][0].axis.source] = (node, part)  # type: ignore[union-attr]
    elif outcome.labels is not None and any_tokens(outcome.labels):
        done.labels[result] = outcome.labels
        if outcome.readout is not None and outcome.readout.kind == "join":
            # While the operands stand where they were: readouts of the concatenation are computed in front of later sites.
            done.state(outcome.readout.axis.source, node.next)
        if outcome.readout is not None and outcome.readout.kind == "batch":
            done.derived[outcome.labels[outcome.readout.dim][0].axis.source] = (node, 0)  # type: ignore[union-attr]
    restoration.note(result)
    return result


def _rename(node: fx.Node, position: int, name: str) -> None:
    """Pass a positional argument under another name."""
    node.update_kwarg(name, node.args[position])
    node.update_arg(position, None)


def _align(done: Insertion, node: fx.Node, align: Align) -> None:
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


def _length(done: Insertion, source: Any, before: fx.Node) -> fx.Node:
    if source not in done.lengths:
        state = done.state(source, before)
        with done.graph.inserting_after(state):
            done.lengths[source] = done.graph.call_function(runtime.state_length, (state,))
    return done.lengths[source]


def _read_out(done: Insertion, node: fx.Node, readout: Readout) -> fx.Node:
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


def _finish(done: Insertion, output: fx.Node, restoration: Restoration) -> None:
    """Give every output its full length back; of what later calls read again, dropped tokens are marked."""
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    kept = output.meta.get("held", {})
    for position, value in enumerate(results):
        labels: Labels | None = done.labels.get(value)
        if labels is None or not any_tokens(labels):
            continue
        if position in kept:
            results[position] = _place(done, value, labels, kept[position], output)
        else:
            results[position] = restoration.full(value, output)
    output.args = (tuple(results),)


def _place(done: Insertion, value: fx.Node, labels: Labels, path: str, output: fx.Node) -> fx.Node:
    """Kept tokens at their places, with marks at those of dropped ones."""
    if not value.meta["val"].dtype.is_floating_point:
        raise InsertRefusal(
            value, "what it keeps for later calls are no floating numbers", done.labels.sites_reaching(output)
        )
    batch_dim = batch_dim_of(labels)
    token_dim = next(d for d, dim in enumerate(labels) if token_axis(dim) is not None)
    axis = token_axis(labels[token_dim])
    assert axis is not None
    with done.graph.inserting_before(output):
        new = done.graph.call_function(placed, (value, done.state(axis.source, output), token_dim, batch_dim))
    new.meta = dict(value.meta)
    done.marked[path] = MarkedAxes(batch_dim, token_dim, str(axis.source))
    return new
