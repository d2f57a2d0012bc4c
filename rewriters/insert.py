"""Insert: put the sites of a plan into a graph and repair everything downstream.

Start at :func:`insert`. The graph is walked once in order. Each operation that runs along a pruned token axis is put
to the rule table (``rules.py``); the outcome's repairs are carried out: side inputs are aligned, baked-in lengths
replaced, readouts remapped. Where every position is needed, tokens are scattered back (``restoration.py``). The stage
decides nothing; what it cannot do it refuses with :class:`InsertRefusal`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from madtp import state as runtime
from rewriters.axes import Axis, AxisError, Labels, any_tokens, token_axis
from rewriters.canonicalise import writes
from rewriters.detect import seed
from rewriters.outcomes import Align, Outcome, Readout, labels_of, op_name
from rewriters.plan import Plan, SitePlan
from rewriters.propagate import runs_along
from rewriters.restoration import Restoration
from rewriters.rules import apply

aten = torch.ops.aten
SITES = "madtp.sites"
END = 9223372036854775807


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

    def newer(self, first: Axis, second: Axis) -> Axis | None:
        """The later of two states of one stream; None if they have nothing to do with each other."""
        if second.source in self.chain(first.source):
            return first
        return second if first.source in self.chain(second.source) else None


def site_key(name: str) -> str:
    """Name of a site as a module name."""
    return name.replace(".", "_").replace("#", "__")


@dataclass
class Insertion:
    """A graph with its sites in place.

    Attributes:
        labels: axis labels of the finished graph, for the cost model.
        states: node of each token state, by source.
        attention_of: site by the node of its scoring attention.
    """

    graph: fx.Graph
    plan: Plan
    labels: Labelling = field(default_factory=Labelling)
    states: dict[Any, fx.Node] = field(default_factory=dict)
    before_site: dict[str, tuple[fx.Node, fx.Node | None]] = field(default_factory=dict)
    derived: dict[Any, tuple[fx.Node, int]] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    aligned: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)
    lengths: dict[Any, fx.Node] = field(default_factory=dict)
    site_inputs: dict[str, tuple[fx.Node, ...]] = field(default_factory=dict)

    def before_site_values(self) -> set[fx.Node]:
        """Residual values in front of a site."""
        return {value for value, _ in self.before_site.values()}

    def state(self, source: Any, before: fx.Node) -> fx.Node:
        """The node that holds the token state of ``source``; derived states are computed where first needed."""
        if source not in self.states:
            parent, kind, *_ = source
            base = self.state(parent, before)
            with self.graph.inserting_before(before):
                if kind == "rest":
                    self.states[source] = self.graph.call_function(runtime.without_first, (base, source[2]))
                else:
                    self.states[source] = self._part(base, *self.derived[source])
        return self.states[source]

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


def insert(graph: fx.Graph, plan: Plan) -> Insertion:
    """Insert all sites of ``plan`` into ``graph``, in place.

    Raises:
        InsertRefusal: an operation downstream of a site has no rule and its tokens go on to later attention.
    """
    done = Insertion(graph, plan)
    by_name = {n.name: n for n in graph.nodes}
    at_attention = {by_name[s.attention]: s for s in plan.sites}
    at_value = {by_name[s.value]: s for s in plan.sites}
    nodes = {s.name: (by_name[s.block_input], tuple(by_name[r] for r in s.readouts)) for s in plan.sites}
    restoration = Restoration(done, post_norm=frozenset(s.name for s in plan.sites if s.norm == "post"))
    _hoist_readouts(graph, [(by_name[s.attention], nodes[s.name][1]) for s in plan.sites])
    for node in list(graph.nodes):
        try:
            if node in at_attention:
                _insert_attention(done, node, at_attention[node], nodes[at_attention[node].name][1])
            elif node.op == "output":
                _finish(done, node, restoration)
            else:
                current = _carry(done, node, restoration) if runs_along(node, done.labels) else node
                if node in at_value:
                    _insert_site(done, current, at_value[node], nodes[at_value[node].name])
        except AxisError as error:
            raise InsertRefusal(node, str(error), _sources(node, done.labels)) from error
    # What only an output read is computed for all tokens now, and its copy over the survivors is dead.
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output", "call_module") or writes(n))
    graph.lint()
    return done


def _hoist_readouts(graph: fx.Graph, wanted: list[tuple[fx.Node, tuple[fx.Node, ...]]]) -> None:
    """Move the computation of readout positions in front of the sites that protect them."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    first: dict[fx.Node, fx.Node] = {}
    for attention, readouts in wanted:
        for readout in readouts:
            if readout not in first or order[attention] < order[first[readout]]:
                first[readout] = attention
    for readout, attention in first.items():
        late: set[fx.Node] = set()
        stack = [readout]
        while stack:
            node = stack.pop()
            if node in late or order[node] < order[attention] or node.op == "placeholder":
                continue
            late.add(node)
            stack.extend(node.all_input_nodes)
        for node in sorted(late, key=order.__getitem__):
            attention.prepend(node)


def _insert_attention(done: Insertion, node: fx.Node, site: SitePlan, readouts: tuple[fx.Node, ...]) -> None:
    graph = done.graph
    outcome: Outcome | None = None
    if runs_along(node, done.labels):
        try:
            outcome = apply(node, done.labels)
        except AxisError as error:
            raise InsertRefusal(node, str(error), _sources(node, done.labels)) from error
        if len({a.source for a in outcome.states.values()}) > 1:
            raise InsertRefusal(node, "queries and keys are at different sites", _sources(node, done.labels))
    state = None
    if outcome is not None and outcome.states:
        state = done.state(next(iter(outcome.states.values())).source, node)
    arguments = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])
    with graph.inserting_before(node):
        call = graph.call_module(
            f"{SITES}.{site_key(site.name)}.attention",
            arguments,
            {
                "scale": node.kwargs.get("scale"),
                "grouped": node.kwargs.get("grouped", False),
                "state": state,
                "readouts": readouts,
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
    done.site_inputs[site.name] = (seen, *readouts)
    graph.erase_node(node)


def _insert_site(done: Insertion, value: fx.Node, site: SitePlan, inputs: tuple[fx.Node, tuple[fx.Node, ...]]) -> None:
    graph = done.graph
    block_input, readouts = inputs
    block_input = done.replaced.get(block_input, block_input)
    labels = done.labels.get(value)
    previous = token_axis(labels[site.token_dim]) if labels is not None else None
    known = done.labels.get(block_input)
    if (token_axis(known[site.token_dim]) if known is not None else None) != previous:
        raise InsertRefusal(value, "the block's input and output are at different sites", _sources(value, done.labels))
    users = list(value.users)
    after = value.next
    state = None if previous is None else done.state(previous.source, after)
    with graph.inserting_before(after):
        tokens, source = value, block_input
        if site.token_dim == 0:
            tokens = graph.call_function(aten.transpose.int, (tokens, 0, 1))
            source = graph.call_function(aten.transpose.int, (source, 0, 1))
        call = graph.call_module(
            f"{SITES}.{site_key(site.name)}", (tokens, source, done.site_inputs[site.name][0], state, readouts)
        )
        pruned = graph.call_function(operator.getitem, (call, 0))
        new_state = graph.call_function(operator.getitem, (call, 1))
        if site.token_dim == 0:
            pruned = graph.call_function(aten.transpose.int, (pruned, 0, 1))
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
    if previous is not None:
        done.labels.parent[site.name] = previous.source


def _carry(done: Insertion, node: fx.Node, restoration: Restoration) -> fx.Node:
    """Apply the rule of ``node`` and carry its repairs out; returns the node that now stands for it."""
    try:
        outcome = apply(node, done.labels)
    except AxisError as error:
        restoration.before(node, str(error), _sources(node, done.labels))
        return node
    restoration.remember(node)
    for align in outcome.aligns:
        restoration.check_side(align, node, _sources(node, done.labels))
        _align(done, node, align)
    for name, axis in outcome.states.items():
        node.kwargs = {**node.kwargs, name: done.state(axis.source, node)}
    for resize in outcome.resizes:
        sizes = list(node.args[resize.argument])  # type: ignore[arg-type]
        sizes[resize.position] = -1 if resize.axis is None else _length(done, resize.axis.source, node)
        node.update_arg(resize.argument, sizes)
    result = _read_out(done, node, outcome.readout) if outcome.readout is not None else node
    if outcome.results is not None:
        done.labels[result] = outcome.results
        if outcome.readout is not None:
            for part, labels in enumerate(outcome.results):
                done.derived[labels[outcome.readout.dim][0].axis.source] = (node, part)  # type: ignore[union-attr]
    elif outcome.labels is not None and any_tokens(outcome.labels):
        done.labels[result] = outcome.labels
        if outcome.readout is not None and outcome.readout.kind == "batch":
            done.derived[outcome.labels[outcome.readout.dim][0].axis.source] = (node, 0)  # type: ignore[union-attr]
    restoration.note(result)
    return result


def _align(done: Insertion, node: fx.Node, align: Align) -> None:
    operand = next(
        a for a in node.all_input_nodes if a is align.operand or done.aligned.get(("of", node, align.operand)) is a
    )
    key = (operand, align.axis, align.present, align.dim, align.batch_dim, align.rank)
    if key not in done.aligned:
        state = done.state(align.axis.source, node)
        before = None if align.present is None else done.state(align.present.source, node)
        with done.graph.inserting_before(node):
            places = (align.dim, align.batch_dim, align.rank)
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
    if kind in ("prefix", "batch"):
        return node
    state = done.state(readout.axis.source, node)
    values = node.args[0]
    with graph.inserting_before(node):
        if kind == "position":
            new = graph.call_function(
                runtime.read_position, (values, state, readout.dim, readout.batch_dim, readout.position)
            )
        elif kind == "rest":
            new = graph.call_function(aten.slice.Tensor, (values, readout.dim, readout.position, END))
        elif kind == "index":
            slots = graph.call_function(runtime.slots_of, (state, readout.index))
            rows = node.args[1][0]  # type: ignore[index]
            new = graph.call_function(aten.index.Tensor, (values, [rows, slots]))
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
    """Give every output its full length back."""
    for value in list(output.all_input_nodes):
        labels: Labels | None = done.labels.get(value)
        if labels is not None and any_tokens(labels):
            output.replace_input_with(value, restoration.full(value, output))


def _sources(node: fx.Node, labels: Labelling) -> set[str]:
    """Names of the sites whose tokens reach ``node``."""
    found: set[str] = set()
    for operand in node.all_input_nodes:
        known = labels.get(operand)
        for dim in _flatten(known):
            for factor in dim:
                if factor.axis is not None and factor.axis.kind == "tokens":
                    source = factor.axis.source
                    while isinstance(source, tuple):
                        source = source[0]
                    found.update(labels.chain(source))
    return found


def _flatten(labels: Any) -> list[Any]:
    if not labels:
        return []
    if labels[0] and hasattr(labels[0][0], "axis"):
        return list(labels)
    if isinstance(labels[0], tuple) and (not labels[0] or isinstance(labels[0][0], tuple)):
        return [d for one in labels for d in (one if one and isinstance(one[0], tuple) else ())]
    return list(labels)
