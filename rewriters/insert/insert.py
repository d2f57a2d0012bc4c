"""Insert: put the sites of a plan into a graph and repair everything downstream.

Start at :func:`insert`. The graph is walked once in order. Each operation that runs along a pruned token axis is put
to the rule table (``axes/table.py``); the outcome's repairs are carried out: side inputs are aligned, baked-in lengths
remapped, readouts remapped. Where every position is needed, tokens are scattered back (``restoration.py``). The stage
decides nothing; what it cannot do it refuses with :class:`InsertRefusal`.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.node import Argument

from madtp.tokens.cache_marks import MarkedAxes, without_dropped
from rewriters.axes.arguments import items
from rewriters.axes.labels import Labels, ResultLabels, seed, token_axis
from rewriters.axes.outcome import Outcome
from rewriters.axes.propagate import runs_along
from rewriters.axes.readouts import BatchReadout, ConcatenationReadout
from rewriters.axes.sources import BatchPart, Source
from rewriters.axes.table import apply
from rewriters.axes.token_moves import TokenMoves
from rewriters.detect.windows import AttentionSpan, moves_to_residual
from rewriters.graph.functional import has_effect
from rewriters.graph.node_record import record
from rewriters.graph.nodes import AxisError, op_name
from rewriters.graph.op_sets import KEEPS_VALUES, PERMUTATIONS, VIEWS
from rewriters.graph.walk import ancestors
from rewriters.insert.dense_sections import DenseSections
from rewriters.insert.repairs import align_operand, pass_states, remap_readout, rename_argument, resize_argument
from rewriters.insert.restoration import Restoration
from rewriters.insert.scoring import SITES, attention_statistics, insert_attention, insert_windows
from rewriters.insert.stream_starts import insert_start, is_start, starts_of
from rewriters.insert.workspace import BatchCut, InsertedSite, Insertion, InsertRefusal, site_key
from rewriters.plan.plan import Plan, SitePlan

aten = torch.ops.aten
IMAGE_FEATURES = ("image", "query")
"""Modalities of streams whose tokens are image features where a decoder reads them."""
# Between keys or values and the attention that reads them.
LAYOUTS = VIEWS | PERMUTATIONS | KEEPS_VALUES | {"expand", "repeat_interleave"}
KEYS_RETURNED = (
    "keys or values of a causal attention are returned, and a later call that takes them for a cache would attend to dropped "
    "tokens; return them in the object of a cache, or leave the argument out that asks for them (use_cache=False)"
)


def insert(graph: fx.Graph, plan: Plan, begin_whole: Collection[int] = ()) -> Insertion:
    """Insert all sites of ``plan`` into ``graph``, in place.

    Args:
        graph: A canonical graph.
        plan: The sites; its names are those of nodes of the graph.
        begin_whole: Streams that begin with all of their tokens, whatever a vision tower has dropped.

    Returns:
        The graph with labels of its nodes, token states and what was replaced.

    Raises:
        InsertRefusal: An operation downstream of a site has no rule, and its tokens go on to later attention.
    """
    insertion = Insertion(graph, plan)
    places = _places(graph, plan)
    at_attention = {place.attention: place for place in places}
    at_value = {place.value: place for place in places}
    starts = {place.value: place for place in starts_of(graph, plan.sites, begin_whole)}
    restoration = Restoration(insertion, post_norm=frozenset(s.name for s in plan.sites if s.norm == "post"))
    _hoist_readouts(places)
    _refuse_keys_outside_caches(graph, places)
    for node in list(graph.nodes):
        restoration.taint(node)
        try:
            _insert_at(insertion, node, restoration, attention=at_attention.get(node), value=at_value.get(node))
            if node in starts:
                insert_start(insertion, starts[node])
        except AxisError as error:
            raise InsertRefusal(node, str(error), insertion.labels.sites_reaching(node)) from error
        restoration.taint_replacements(node)
    # What only an output reads is computed for all tokens now, and its copy over the survivors is dead. Token states stay: a
    # later stage may need those that nothing reads yet.
    states = set(insertion.states.values())
    graph.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output", "call_module") or n in states or has_effect(n)
    )
    graph.lint()
    return insertion


@dataclass(frozen=True)
class _Place:
    """Where a site goes.

    Attributes:
        site: The site.
        attention: The attention of its block.
        value: The residual value that it prunes.
        block_input: The residual value at the input of its block.
        readouts: Positions that the model reads, which are protected.
        moves: How numbers get from windows of the grid back to its tokens, where attention runs in windows.
    """

    site: SitePlan
    attention: fx.Node
    value: fx.Node
    block_input: fx.Node
    readouts: tuple[fx.Node, ...]
    moves: TokenMoves | None


def _places(graph: fx.Graph, plan: Plan) -> list[_Place]:
    """The places of all sites in the captured graph."""
    nodes = {n.name: n for n in graph.nodes}
    readouts = {name: _position(graph, name, nodes) for s in plan.sites for name in s.readouts}
    captured = list(graph.nodes)
    return [
        _Place(
            site=site,
            attention=nodes[site.attention],
            value=nodes[site.value],
            block_input=nodes[site.block_input],
            readouts=tuple(readouts[name] for name in site.readouts),
            moves=_moves_to_tokens(captured, nodes, site) if site.scores == "windows" else None,
        )
        for site in plan.sites
    ]


def _refuse_keys_outside_caches(graph: fx.Graph, places: list[_Place]) -> None:
    """Refuse sites in front of a causal attention whose keys or values are returned, and not in the object of a cache.

    A later call may take them for a cache, in which dropped tokens would stand as they last were.

    Raises:
        InsertRefusal: there are such sites.
    """
    output = next(n for n in graph.nodes if n.op == "output")
    cached = record(output).cache_paths or {}
    returned = {n for at, n in enumerate(items(output, 0)) if isinstance(n, fx.Node) and at not in cached}
    for place in places:
        if place.site.causal and place.attention.op == "call_function":
            operands = [n for n in place.attention.args[1:3] if isinstance(n, fx.Node)]
            read = set(ancestors(*operands, through=lambda n: op_name(n) in LAYOUTS)) & returned
            before = {
                one.site.name for one in places if one.site.stream == place.site.stream and one.value < place.value
            }
            if read and before:
                raise InsertRefusal(next(iter(read)), KEYS_RETURNED, before)


def _moves_to_tokens(captured: list[fx.Node], nodes: dict[str, fx.Node], site: SitePlan) -> TokenMoves | None:
    span = AttentionSpan(captured, nodes[site.block_input], nodes[site.attention], nodes[site.value])
    return moves_to_residual(span, site)


def _insert_at(
    insertion: Insertion, node: fx.Node, restoration: Restoration, *, attention: _Place | None, value: _Place | None
) -> None:
    """Insert or repair what stands at ``node``.

    Args:
        insertion: The graph.
        node: The node.
        restoration: Restores values that are needed in full.
        attention: The site whose attention it is, if any.
        value: The site that prunes it, if any.
    """
    if attention is not None and attention.site.scores == "windows":
        source = _source_of(insertion, insertion.current(attention.block_input), attention.site.token_dim)
        insert_windows(insertion, node, attention.site, source=source, sections=restoration.sections)
    elif attention is not None and attention.site.scores == "attention":
        restoration.hide_dropped(node)
        insert_attention(insertion, node, attention.site, attention.readouts)
    elif node.op == "output":
        _complete_outputs(insertion, node, restoration)
    else:
        current = _repair(insertion, node, restoration) if runs_along(node, insertion.labels) else node
        if value is not None:
            _insert_site(insertion, current, value, restoration.sections)


def _position(graph: fx.Graph, name: str, by_name: dict[str, fx.Node]) -> fx.Node:
    """The node of a readout position: "node", or "node+3" for three tokens behind it."""
    base, _, offset = name.partition("+")
    if not offset:
        return by_name[base]
    with graph.inserting_after(by_name[base]):
        return graph.call_function(operator.add, (by_name[base], int(offset)))


def _hoist_readouts(places: list[_Place]) -> None:
    """Move the computation of readout positions in front of the sites that protect them."""
    first: dict[fx.Node, fx.Node] = {}
    for place in places:
        for readout in place.readouts:
            if readout not in first or place.attention < first[readout]:
                first[readout] = place.attention
    # What several readouts are computed from moves with the last of these steps, in front of the earliest site.
    for readout, attention in sorted(first.items(), key=lambda item: item[1], reverse=True):
        late = _computed_behind(readout, attention)
        if attention in late:
            reason = "a position that is read is computed from the tokens themselves"
            raise InsertRefusal(readout, reason, {p.site.name for p in places if readout in p.readouts})
        for node in late:
            attention.prepend(node)


def _computed_behind(node: fx.Node, border: fx.Node) -> list[fx.Node]:
    """``node`` and what it is computed from, in the order of the graph, except for what comes before ``border``."""

    def is_behind(other: fx.Node) -> bool:
        return other.op != "placeholder" and not other < border

    return sorted(ancestors(node, among=is_behind)) if is_behind(node) else []


def _source_of(insertion: Insertion, node: fx.Node, token_dim: int) -> Source | None:
    """The state that a residual value is along; None where no token was dropped yet."""
    labels = insertion.labels.tensor(node)
    axis = None if labels is None else token_axis(labels[token_dim])
    return None if axis is None else axis.source


def _insert_site(insertion: Insertion, value: fx.Node, place: _Place, sections: DenseSections) -> None:
    graph, site = insertion.graph, place.site
    block_input = insertion.current(place.block_input)
    previous = _source_of(insertion, value, site.token_dim)
    if _source_of(insertion, block_input, site.token_dim) != previous:
        reason = "the block's input and output are at different sites"
        raise InsertRefusal(value, reason, insertion.labels.sites_reaching(value))
    users = list(value.users)
    after = value.next
    state = None if previous is None else insertion.state(previous, after)
    with graph.inserting_before(after):
        tokens, source = value, block_input
        if site.token_dim != 1:
            tokens = graph.call_function(aten.transpose.int, (tokens, site.token_dim, 1))
            source = graph.call_function(aten.transpose.int, (source, site.token_dim, 1))
        statistics = attention_statistics(insertion, site, state=state, moves=place.moves, sections=sections)
        call = graph.call_module(
            f"{SITES}.{site_key(site.name)}",
            (tokens, source, statistics, state, place.readouts, insertion.segment_maps.get(site.stream)),
        )
        pruned = rows = graph.call_function(operator.getitem, (call, 0))
        new_state = graph.call_function(operator.getitem, (call, 1))
        if site.token_dim != 1:
            pruned = graph.call_function(aten.transpose.int, (rows, site.token_dim, 1))
    call.meta["nn_module_stack"] = value.meta.get("nn_module_stack", {})
    pruned.meta = {"val": value.meta["val"], "nn_module_stack": value.meta.get("nn_module_stack", {})}
    for user in users:
        user.replace_input_with(value, pruned)
    shape = tuple(sum((f.size for f in d), 0) if len(d) == 1 else 0 for d in insertion.labels.of(value))
    insertion.labels[pruned] = seed(shape, site.batch_dim, site.token_dim, site.name)
    for transposed, original in ((tokens, value), (source, block_input), (rows, pruned)):
        _label_transposed(insertion, transposed, original, site.token_dim)
    insertion.states[site.name] = new_state
    insertion.replaced[value] = pruned
    insertion.sites[site.name] = InsertedSite(value, state, block_input)
    insertion.site_values.add(value)
    if previous is not None:
        insertion.labels.parent[site.name] = previous


def _label_transposed(insertion: Insertion, transposed: fx.Node, value: fx.Node, token_dim: int) -> None:
    """Label ``value`` with its tokens brought to dimension 1."""
    known = insertion.labels.tensor(value)
    if known is not None and transposed is not value:
        order = {token_dim: 1, 1: token_dim}
        insertion.labels[transposed] = Labels(known[order.get(d, d)] for d in range(len(known)))


def _repair(insertion: Insertion, node: fx.Node, restoration: Restoration) -> fx.Node:
    """Apply the rule of ``node`` and carry its repairs out; return the node that replaces it."""
    try:
        outcome = apply(node, insertion.labels)
    except AxisError as error:
        restoration.restore_operands(node, str(error))
        return node
    restoration.hide_dropped(node)
    for align in outcome.aligns:
        align_operand(insertion, node, align)
    if outcome.renamed is not None:
        rename_argument(node, outcome.renamed)
    pass_states(insertion, node, outcome.states)
    for resize in outcome.resizes:
        resize_argument(insertion, node, resize)
    result = remap_readout(insertion, node, outcome.readout) if outcome.readout is not None else node
    if isinstance(outcome.labels, ResultLabels) or (outcome.labels is not None and outcome.labels.any_tokens()):
        insertion.labels[result] = outcome.labels
        _note_derived_states(insertion, node, outcome)
    restoration.note_residual(result)
    return result


def _note_derived_states(insertion: Insertion, node: fx.Node, outcome: Outcome) -> None:
    """Note how the states of what ``node`` cuts or joins are computed."""
    if isinstance(outcome.readout, ConcatenationReadout):
        # While the operands stand where they were: readouts of the concatenation are computed in front of later sites.
        insertion.state(outcome.readout.axis.source, node.next)
    if isinstance(outcome.readout, BatchReadout):
        results = outcome.labels if isinstance(outcome.labels, ResultLabels) else (outcome.labels,)
        for number, labels in enumerate(results):
            for source in labels.token_sources() if labels is not None else ():
                if isinstance(source, BatchPart):
                    insertion.batch_cuts[source] = BatchCut(node, number)


def _complete_outputs(insertion: Insertion, output: fx.Node, restoration: Restoration) -> None:
    """Give every output its full length back; in what a key/value cache holds, dropped tokens are marked."""
    results: list[Argument] = list(items(output, 0))
    cached = record(output).cache_paths or {}
    for position, value in enumerate(results):
        labels = insertion.labels.tensor(value)
        if not isinstance(value, fx.Node) or labels is None or not labels.any_tokens():
            continue
        if position in cached:
            results[position] = _marked(insertion, value, labels, cached[position], output)
        else:
            if not restoration.tainted.get(value):  # else it holds what was computed from all tokens
                _note_dropped(insertion, position, labels)
            results[position] = restoration.with_all_tokens(value, output)
    output.args = (tuple(results),)


def _note_dropped(insertion: Insertion, position: int, labels: Labels | ResultLabels) -> None:
    """Note which site has dropped image tokens of an output ``[B, N, C]``, for those who read it outside the graph."""
    if not isinstance(labels, Labels) or len(labels) != 3 or (labels.batch_dim(), labels.token_dim()) != (0, 1):
        return
    axis = token_axis(labels[1])
    if axis is None or not isinstance(axis.source, str) or is_start(axis.source):
        return
    modality = next(site.modality for site in insertion.plan.sites if site.name == axis.source)
    if modality in IMAGE_FEATURES:
        insertion.output_sites[position] = axis.source


def _marked(insertion: Insertion, value: fx.Node, labels: Labels, path: str, output: fx.Node) -> fx.Node:
    """Kept tokens at their places, with marks at those of dropped ones."""
    if not value.meta["val"].dtype.is_floating_point:
        reason = "the key/value cache holds it, and its numbers are not floating-point"
        raise InsertRefusal(value, reason, insertion.labels.sites_reaching(output))
    batch_dim, token_dim = labels.batch_dim(), labels.token_dim()
    axis = token_axis(labels[token_dim])
    assert axis is not None
    with insertion.graph.inserting_before(output):
        state = insertion.state(axis.source, output)
        new = insertion.graph.call_function(without_dropped, (value, state, token_dim, batch_dim))
    new.meta = dict(value.meta)
    insertion.marked[path] = MarkedAxes(batch_dim, token_dim, str(axis.source))
    return new
