"""Insert: put the sites of a plan into a graph and repair everything downstream.

Start at :func:`insert`. The graph is walked once in order. Each operation that runs along a pruned token axis is put
to the rule table (``axes/table.py``); the outcome's repairs are carried out: side inputs are aligned, baked-in lengths
replaced, readouts remapped. Where every position is needed, tokens are scattered back (``restoration.py``). The stage
decides nothing; what it cannot do it refuses with :class:`InsertRefusal`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from madtp.tokens.cache_marks import MarkedAxes, mark_dropped
from rewriters.axes.grid import Moves
from rewriters.axes.labels import Labels, any_tokens, seed, token_axis
from rewriters.axes.outcome import batch_dim_of, labels_of
from rewriters.axes.propagate import runs_along
from rewriters.axes.table import apply
from rewriters.detect.windows import way_home
from rewriters.graph.functional import has_effect
from rewriters.graph.nodes import AxisError
from rewriters.insert.grid_excursions import Excursions
from rewriters.insert.repairs import align_operand, length, read_out, rename
from rewriters.insert.restoration import Restoration
from rewriters.insert.scoring import SITES, insert_attention, insert_windows, seen_at
from rewriters.insert.workspace import Insertion, InsertRefusal, site_key
from rewriters.plan.plan import Plan, SitePlan

aten = torch.ops.aten


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
    captured = list(graph.nodes)
    windowed = [s for s in plan.sites if s.scores == "windows"]
    ways = {
        s.name: way_home(captured, by_name[s.attention], by_name[s.block_input], by_name[s.value], s) for s in windowed
    }
    restoration = Restoration(done, post_norm=frozenset(s.name for s in plan.sites if s.norm == "post"))
    _hoist_readouts(graph, [(by_name[s.attention], nodes[s.name][1], s.name) for s in plan.sites])
    for node in list(graph.nodes):
        restoration.remember(node)
        try:
            site = at_attention.get(node)
            if site is not None and site.scores == "windows":
                state = _source_at(done, done.replaced.get(nodes[site.name][0], nodes[site.name][0]), site.token_dim)
                insert_windows(done, node, site, state, restoration.excursions)
            elif site is not None and site.scores == "attention":
                restoration.check(node)
                insert_attention(done, node, site, nodes[site.name][1])
            elif node.op == "output":
                _finish(done, node, restoration)
            else:
                current = _carry(done, node, restoration) if runs_along(node, done.labels) else node
                if node in at_value:
                    site = at_value[node]
                    _insert_site(done, current, site, nodes[site.name], restoration.excursions, ways.get(site.name))
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


def _source_at(done: Insertion, node: fx.Node, token_dim: int) -> Any:
    """The state that a residual value is along, None if it was not pruned yet."""
    known = done.labels.get(node)
    axis = None if known is None else token_axis(known[token_dim])
    return None if axis is None else axis.source


def _insert_site(
    done: Insertion,
    value: fx.Node,
    site: SitePlan,
    inputs: tuple[fx.Node, tuple[fx.Node, ...]],
    excursions: Excursions,
    way: Moves | None,
) -> None:
    graph = done.graph
    block_input, readouts = inputs
    block_input = done.replaced.get(block_input, block_input)
    previous = _source_at(done, value, site.token_dim)
    if _source_at(done, block_input, site.token_dim) != previous:
        raise InsertRefusal(
            value, "the block's input and output are at different sites", done.labels.sites_reaching(value)
        )
    users = list(value.users)
    after = value.next
    state = None if previous is None else done.state(previous, after)
    with graph.inserting_before(after):
        tokens, source = value, block_input
        if site.token_dim != 1:
            tokens = graph.call_function(aten.transpose.int, (tokens, site.token_dim, 1))
            source = graph.call_function(aten.transpose.int, (source, site.token_dim, 1))
        seen = seen_at(done, site, tokens, state, way, excursions)
        call = graph.call_module(
            f"{SITES}.{site_key(site.name)}",
            (tokens, source, seen, state, readouts, done.segment_maps.get(site.stream)),
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
        done.labels.parent[site.name] = previous


def _carry(done: Insertion, node: fx.Node, restoration: Restoration) -> fx.Node:
    """Apply the rule of ``node`` and carry its repairs out; returns the node that now stands for it."""
    try:
        outcome = apply(node, done.labels)
    except AxisError as error:
        restoration.before(node, str(error))
        return node
    restoration.check(node)
    for align in outcome.aligns:
        align_operand(done, node, align)
    if outcome.renamed is not None:
        rename(node, *outcome.renamed)
    for name, axis in outcome.states.items():
        node.kwargs = {**node.kwargs, name: done.state(axis.source, node)}
    for resize in outcome.resizes:
        sizes = list(node.args[resize.argument])  # type: ignore[arg-type]
        sizes[resize.position] = -1 if resize.axis is None else length(done, resize.axis.source, node)
        node.update_arg(resize.argument, sizes)
    result = read_out(done, node, outcome.readout) if outcome.readout is not None else node
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
        new = done.graph.call_function(mark_dropped, (value, done.state(axis.source, output), token_dim, batch_dim))
    new.meta = dict(value.meta)
    done.marked[path] = MarkedAxes(batch_dim, token_dim, str(axis.source))
    return new
