"""Restoration: where a graph needs every position, scatter the tokens back to their places.

Start at :class:`Restoration`. Tokens are scattered back in the space of the residual stream, where the last state of
a dropped token means the same as that of a survivor; what the graph computes from there on, token by token, is
computed again for all tokens. What flows back into the pruned stream from there is an excursion (``grid_excursions.py``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from madtp.tokens import state as runtime
from madtp.tokens.attention import attention
from madtp.tokens.attention_maps import weigh
from rewriters.axes.labels import any_tokens, axes_of, token_axis
from rewriters.axes.outcome import batch_dim_of, labels_of
from rewriters.axes.table import knows
from rewriters.graph.emit import emit
from rewriters.graph.node_record import record, set_record
from rewriters.graph.nodes import AxisError, is_attention, op_name
from rewriters.insert.grid_excursions import Excursions
from rewriters.insert.workspace import Insertion, InsertRefusal

NORMS = frozenset(("layer_norm", "rms_norm"))
SAME_SPACE = NORMS | frozenset(
    "dropout to _to_copy type_as contiguous clone alias detach mul div add transpose permute".split()
)


class Restoration:
    """Restores values of one graph under insertion."""

    def __init__(self, done: Insertion, post_norm: frozenset[str]) -> None:
        """``post_norm``: the sites of post-norm blocks, whose residual value is the output of a norm."""
        self.done = done
        self.post_norm = post_norm
        self.order = {node: position for position, node in enumerate(done.graph.nodes)}
        self.original = {node: (node.args, dict(node.kwargs)) for node in done.graph.nodes}
        self.operations: dict[fx.Node, Any] = {
            node: node.target if node.op == "call_function" else None for node in done.graph.nodes
        }
        self.users = {node: list(node.users) for node in done.graph.nodes}
        self.anchors: set[fx.Node] = set()
        self.restored: dict[fx.Node, fx.Node] = {}
        self.stream_of = {site.name: site.stream for site in done.plan.sites}
        # Sites whose dropped tokens a value was computed from, after they were scattered back, and why they were.
        self.tainted: dict[fx.Node, dict[str, str]] = {}
        self.excursions = Excursions(done)

    def remember(self, node: fx.Node) -> None:
        """Taint what is computed from restored values."""
        found: dict[str, str] = {}
        for operand in node.all_input_nodes:
            found |= self.tainted.get(operand, {})
        if found:
            self.tainted[node] = found

    def pass_on(self, node: fx.Node) -> None:
        """What replaces a tainted node is tainted; what runs on all tokens is followed."""
        if self.tainted.get(node):
            self.excursions.follow(node)
        while node in self.done.replaced and node in self.tainted:
            self.tainted[self.done.replaced[node]] = self.tainted[node]
            node = self.done.replaced[node]

    def note(self, node: fx.Node) -> None:
        """Learn whether ``node`` is a value of a residual stream: an add of two values along its tokens, one of them the
        stream's. A constant added to normalised tokens (a type embedding) makes no residual value of them."""
        labels = self.done.labels.get(node)
        if labels is None or node not in self.original or not isinstance(labels[0], tuple):
            return
        if op_name(node) in NORMS and self._is_post_norm(labels):
            before = self.original[node][0][0]
            if before in self.anchors and op_name(before) == "add":
                self.anchors.add(node)
            return
        if op_name(node) != "add":
            return
        operands = self.original[node][0][:2]
        along = all(map(self._runs_along, operands)) and any(map(self._is_residual, operands))
        # What was computed on the whole grid is added to the stream itself, not to its tokens behind a norm.
        residual = any(self._is_residual(n, SAME_SPACE - NORMS) for n in operands)
        if along or (residual and any(map(self._was_restored, operands))):
            self.anchors.add(node)

    def _was_restored(self, operand: Any) -> bool:
        """Whether a captured operand is computed on all tokens of a pruned stream now."""
        return bool(self.tainted.get(operand)) and not self._runs_along(operand)

    def _runs_along(self, operand: Any) -> bool:
        """Whether a captured operand runs along pruned tokens now."""
        return operand in self.done.labels or self.done.replaced.get(operand) in self.done.labels

    def _is_post_norm(self, labels: Any) -> bool:
        sources = [a.source for dim in labels for a in axes_of(dim) if a.kind == "tokens"]
        return any(source in self.post_norm for source in sources)

    def _is_residual(self, operand: Any, through: frozenset[str] = SAME_SPACE) -> bool:
        """Whether ``operand`` is a value of the residual stream, up to operations that leave it in its space."""
        sites = self.done.site_values
        while isinstance(operand, fx.Node):
            if operand in self.anchors or operand in sites or self.done.replaced.get(operand) in sites:
                return True
            if operand.op != "call_function" or op_name(operand) not in through:
                return False
            operand = next((a for a in self._original_inputs(operand) if a in self.done.labels), None)
        return False

    def _original_inputs(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.map_arg(self.original.get(node, ((), {})), lambda n: found.append(n))
        return found

    def before(self, node: fx.Node, reason: str) -> None:
        """Feed ``node`` with restored operands: another stream may read every position, or a head.

        An operation that no rule knows may do anything with the tokens; where later attention reads it, it is refused.
        """
        sources = self.done.labels.sites_reaching(node)
        if not knows(node) and self._reaches_attention(node):
            raise InsertRefusal(node, reason, sources)
        for operand in list(node.all_input_nodes):
            labels = self.done.labels.get(operand)
            if labels is None or not _labelled(labels):
                continue
            try:
                node.replace_input_with(operand, self.full(operand, node))
            except AxisError as error:
                raise InsertRefusal(node, f"{reason}; {error}", sources) from error
        self.tainted[node] = self.tainted.get(node, {}) | dict.fromkeys(sources, f"{reason} at {node.name}")

    def check(self, node: fx.Node) -> None:
        """Where what was computed from restored values flows back into the pruned stream, dropped tokens are hidden from the
        attention on the way, so that they do not take part again."""
        if node not in self.tainted:
            return
        sources = self.done.labels.sites_reaching(node)
        back = sources & self.tainted[node].keys()
        if not back:
            return
        try:
            self.excursions.close(self._inside(node, back))
        except AxisError as error:
            why = next(self.tainted[node][site] for site in back)
            reason = f"{why}, which reads every position, flows back into the pruned tokens, and {error}"
            raise InsertRefusal(node, reason, back) from error
        self.tainted[node] = {site: why for site, why in self.tainted[node].items() if site not in back}

    def _inside(self, node: fx.Node, sites: set[str]) -> list[fx.Node]:
        """``node`` and what it is computed from on all tokens of the streams of ``sites``, in the order of the graph."""
        stack, seen = [node], {node}
        while stack:
            for operand in stack.pop().all_input_nodes:
                if operand not in seen and sites & self.tainted.get(operand, {}).keys():
                    seen.add(operand)
                    stack.append(operand)
        return sorted(seen)

    def _reaches_attention(self, node: fx.Node) -> bool:
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if is_attention(current) or current.op == "call_module":
                return True
            for user in current.users:
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
        return False

    def full(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """``node`` with all original tokens; raises :class:`AxisError` if no residual value leads to it."""
        if node in self.restored:
            return self.restored[node]
        labels = self.done.labels.get(node)
        if labels is None or not _labelled(labels):
            return node
        site = self._site_after(node)
        if (site is not None or node in self.anchors) and self._sites_of_stream(labels):
            result = self._restore(node, before)
        else:
            result = self._recompute(node, before)
        self.restored[node] = result
        return result

    def _sites_of_stream(self, labels: Any) -> list[str]:
        """The sites that pruned the tokens of a value in its own stream, first one first; none if the value was cut,
        concatenated or belongs to a stream that begins with pruned tokens and has no site yet."""
        source = next(a.source for dim in labels for a in axes_of(dim) if a.kind == "tokens")
        if isinstance(source, tuple):
            return []
        names = [name for name in self.done.labels.chain(source) if not isinstance(name, tuple)]
        own = [name for name in names if self.stream_of.get(name) == self.stream_of.get(names[0])]
        return own[::-1]

    def _site_after(self, node: fx.Node) -> str | None:
        for name, (value, _) in self.done.before_site.items():
            if self.done.replaced.get(value) is node:
                return name
        return None

    def _restore(self, node: fx.Node, before: fx.Node) -> fx.Node:
        labels = labels_of(node, self.done.labels)
        batch_dim = batch_dim_of(labels)
        token_dim = next(d for d, dim in enumerate(labels) if token_axis(dim) is not None)
        axis = token_axis(labels[token_dim])
        assert axis is not None
        sites = self._sites_of_stream(labels)
        places = {(s.token_dim, s.batch_dim) for s in self.done.plan.sites if s.name in sites}
        if len(places) != 1 or next(iter(places))[1] != batch_dim or len(labels) != 3:
            raise AxisError("every position is needed where the tokens stand in another dimension than at the sites")
        there, _ = next(iter(places))
        earlier: list[tuple[fx.Node, fx.Node | None]] = [self.done.before_site[name] for name in sites]
        if earlier[0][1] is not None:
            # The stream began with tokens that another one had pruned: what was dropped there enters all the same.
            earlier.insert(0, (self.full(self.done.entrances[sites[0]], before), None))
        state = self.done.state(axis.source, before)
        tokens = self._turned(node, token_dim, there, before)
        with self.done.graph.inserting_before(before):
            new = self.done.graph.call_function(runtime.restore, (tokens, state, there, batch_dim, earlier))
        new.meta = dict(tokens.meta)
        self.excursions.begin(new, axis.source, batch_dim, there)
        result = self._turned(new, there, token_dim, before)
        self.excursions.follow(result)
        return result

    def _turned(self, node: fx.Node, token_dim: int, there: int, before: fx.Node) -> fx.Node:
        """``node`` with its tokens in another dimension."""
        if token_dim == there:
            return node
        with self.done.graph.inserting_before(before):
            return emit(self.done.graph, torch.ops.aten.transpose.int, (node, token_dim, there), node)

    def _recompute(self, node: fx.Node, before: fx.Node) -> fx.Node:
        old = node
        if node not in self.original:
            old = next((before for before, after in self.done.replaced.items() if after is node), node)
        if old not in self.original or self.operations[old] in (None, attention, weigh):
            raise AxisError("every position is needed behind an operation that mixes tokens")
        args, kwargs = self.original[old]
        new_args = fx.map_arg(args, lambda n: self._current(n, before))
        new_kwargs = fx.map_arg(kwargs, lambda n: self._current(n, before))
        with self.done.graph.inserting_before(before):
            new = self.done.graph.create_node("call_function", self.operations[old], new_args, new_kwargs)
        new.meta = dict(node.meta)
        set_record(new, replace(record(new), recomputed=node))
        self.excursions.follow(new)
        return new

    def _current(self, node: fx.Node, before: fx.Node) -> Any:
        """What stands for an operand of the captured graph now, with all its tokens."""
        if node in self.done.site_values:
            return self.full(self.done.replaced[node], before)
        if node in self.done.replaced:
            node = self.done.replaced[node]
        return self.full(node, before)


def _labelled(labels: Any) -> bool:
    first = labels[0] if labels else ()
    if first and isinstance(first[0], tuple) and not hasattr(first[0], "axis"):
        return any(any_tokens(one) for one in labels)
    return any_tokens(labels)
