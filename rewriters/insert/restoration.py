"""Restoration: where a graph needs every position, scatter the tokens back to their original positions.

Start at :class:`Restoration`. Tokens are scattered back in the space of the residual stream, where the last state of
a dropped token means the same as that of a survivor. What the graph computes from there on, token by token, is
computed again for all tokens. What flows back into the pruned stream from there is a dense section
(``dense_sections.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.fx.node import Argument, Target

from madtp.sites.stream_start import SUFFIX
from madtp.tokens import state as runtime
from madtp.tokens.attention import attention
from madtp.tokens.attention_maps import weigh
from rewriters.axes.labels import Labels, ResultLabels, token_axis
from rewriters.axes.sources import Derived
from rewriters.axes.table import knows
from rewriters.graph.emit import emit
from rewriters.graph.node_record import record, set_record
from rewriters.graph.nodes import AxisError, is_attention, op_name
from rewriters.graph.op_sets import ADDS, NORMS, RESIDUAL_STEPS
from rewriters.graph.residual import terms
from rewriters.graph.walk import ancestors, descendants
from rewriters.insert.dense_sections import DenseSections
from rewriters.insert.workspace import Insertion, InsertRefusal

# What leaves a value in the space of the residual stream.
SAME_SPACE = RESIDUAL_STEPS | ADDS | NORMS


@dataclass(frozen=True)
class CapturedCall:
    """A node as it was captured; ``operation`` is None where it is not a call of a function."""

    operation: Target | None = None
    args: tuple[Argument, ...] = ()
    kwargs: dict[str, Argument] = field(default_factory=dict)

    def inputs(self) -> list[fx.Node]:
        """All nodes among the arguments, in order."""
        found: list[fx.Node] = []
        fx.map_arg((self.args, self.kwargs), found.append)
        return found


class Restoration:
    """Restores values of one graph under insertion.

    Attributes:
        captured: All nodes as they were captured.
        residual_values: Nodes that are values of a residual stream.
        restored: Nodes with all their tokens, by the node that lacks some.
        tainted: Nodes that are computed from dropped tokens after these were scattered back: the sites that had dropped
            them, and why they were restored.
        sections: What runs on all tokens.
    """

    def __init__(self, insertion: Insertion, post_norm: frozenset[str]) -> None:
        """Starts from the captured graph.

        Args:
            insertion: The graph, before anything is inserted.
            post_norm: The sites of post-norm blocks, whose residual value is the output of a norm.
        """
        self.insertion = insertion
        self.post_norm = post_norm
        self.captured = {
            node: CapturedCall(node.target if node.op == "call_function" else None, node.args, dict(node.kwargs))
            for node in insertion.graph.nodes
        }
        self.residual_values: set[fx.Node] = set()
        self.restored: dict[fx.Node, fx.Node] = {}
        self.stream_of = {site.name: site.stream for site in insertion.plan.sites}
        self.stream_of |= {f"{site.name}{SUFFIX}": site.stream for site in insertion.plan.sites}
        self.tainted: dict[fx.Node, dict[str, str]] = {}
        self.sections = DenseSections(insertion)

    def taint(self, node: fx.Node) -> None:
        """Taint ``node`` if it is computed from restored values."""
        found: dict[str, str] = {}
        for operand in node.all_input_nodes:
            found |= self.tainted.get(operand, {})
        if found:
            self.tainted[node] = found

    def taint_replacements(self, node: fx.Node) -> None:
        """Taint what replaces a tainted node, and follow it if it runs on all tokens."""
        if self.tainted.get(node):
            self.sections.follow(node)
        while node in self.insertion.replaced and node in self.tainted:
            self.tainted[self.insertion.replaced[node]] = self.tainted[node]
            node = self.insertion.replaced[node]

    def note_residual(self, node: fx.Node) -> None:
        """Learn whether ``node`` is a value of a residual stream.

        It is if it adds two values along the stream's tokens, one of which is a value of the stream. A constant added to
        normalised tokens (a type embedding) does not make a residual value of them.
        """
        labels = self.insertion.labels.tensor(node)
        if labels is None or node not in self.captured:
            return
        args = self.captured[node].args
        if op_name(node) in NORMS and self._is_post_norm(labels):
            before = args[0]
            if isinstance(before, fx.Node) and before in self.residual_values and op_name(before) in ADDS:
                self.residual_values.add(node)
            return
        added = terms(op_name(node), args)
        operands = [factor for term in added for factor in term]
        along = all(any(map(self._runs_along, term)) for term in added) and any(map(self._is_residual, operands))
        # What was computed on the whole grid is added to the stream itself, not to its tokens behind a norm.
        residual = any(self._is_residual(n, SAME_SPACE - NORMS) for n in operands)
        if along or (residual and any(map(self._was_restored, operands))):
            self.residual_values.add(node)

    def _was_restored(self, operand: object) -> bool:
        """Whether a captured operand is computed on all tokens of a pruned stream now."""
        return isinstance(operand, fx.Node) and bool(self.tainted.get(operand)) and not self._runs_along(operand)

    def _runs_along(self, operand: object) -> bool:
        """Whether a captured operand runs along pruned tokens now."""
        if not isinstance(operand, fx.Node):
            return False
        return operand in self.insertion.labels or self.insertion.replaced.get(operand) in self.insertion.labels

    def _is_post_norm(self, labels: Labels) -> bool:
        return any(source in self.post_norm for source in labels.token_sources())

    def _is_residual(self, operand: object, through: frozenset[str] = SAME_SPACE) -> bool:
        """Whether ``operand`` is a value of the residual stream, up to operations that leave it in its space."""
        sites = self.insertion.site_values
        while isinstance(operand, fx.Node):
            if operand in self.residual_values or operand in sites or self.insertion.replaced.get(operand) in sites:
                return True
            if operand.op != "call_function" or op_name(operand) not in through:
                return False
            inputs = self.captured.get(operand, CapturedCall()).inputs()
            operand = next((a for a in inputs if a in self.insertion.labels), None)
        return False

    def restore_operands(self, node: fx.Node, reason: str) -> None:
        """Feed ``node`` with restored operands, since it needs every position (a head may, or another stream).

        An operation without a rule may do anything with the tokens. Where later attention reads its result, it is refused.

        Args:
            node: The operation.
            reason: Why it needs every position.

        Raises:
            InsertRefusal: An operand cannot be restored, or later attention reads the result of an unknown operation.
        """
        sources = self.insertion.labels.sites_reaching(node)
        if not knows(node) and _reaches_attention(node):
            raise InsertRefusal(node, reason, sources)
        for operand in list(node.all_input_nodes):
            if not self._lacks_tokens(operand):
                continue
            try:
                node.replace_input_with(operand, self.with_all_tokens(operand, node))
            except AxisError as error:
                raise InsertRefusal(node, f"{reason}; {error}", sources) from error
        self.tainted[node] = self.tainted.get(node, {}) | dict.fromkeys(sources, f"{reason} at {node.name}")

    def _lacks_tokens(self, node: fx.Node) -> bool:
        labels = self.insertion.labels.get(node)
        return labels is not None and labels.any_tokens()

    def hide_dropped(self, node: fx.Node) -> None:
        """Hide dropped tokens from the attention in a dense section that ends at ``node``.

        It ends where what was computed from restored values flows back into the pruned stream. Dropped tokens must not
        take part again.
        """
        if node not in self.tainted:
            return
        sources = self.insertion.labels.sites_reaching(node)
        back = sources & self.tainted[node].keys()
        if not back:
            return
        try:
            self.sections.hide_dropped(self._section(node, back))
        except AxisError as error:
            why = next(self.tainted[node][site] for site in back)
            reason = f"{why}, which reads every position, flows back into the pruned tokens, and {error}"
            raise InsertRefusal(node, reason, back) from error
        self.tainted[node] = {site: why for site, why in self.tainted[node].items() if site not in back}

    def _section(self, node: fx.Node, sites: set[str]) -> list[fx.Node]:
        """``node`` and what it is computed from on all tokens of the streams of ``sites``, in the order of the graph."""
        return sorted(ancestors(node, among=lambda n: not sites.isdisjoint(self.tainted.get(n, {}))))

    def with_all_tokens(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """``node`` with all original tokens; raises :class:`AxisError` if no residual value leads to it."""
        if node in self.restored:
            return self.restored[node]
        labels = self.insertion.labels.get(node)
        if labels is None or not labels.any_tokens():
            return node
        residual = node in self.residual_values or self._stands_before_site(node)
        if residual and self._sites_of_stream(labels):
            result = self._restore(node, before)
        else:
            result = self._recompute(node, before)
        self.restored[node] = result
        return result

    def _sites_of_stream(self, labels: Labels | ResultLabels) -> list[str]:
        """The sites that pruned the tokens of a value in its own stream, in the order of the graph.

        There are none if the value was cut or concatenated, or if its stream begins with pruned tokens and has no site yet.
        """
        source = labels.token_sources()[0]
        if isinstance(source, Derived):
            return []
        names = [name for name in self.insertion.labels.chain(source) if isinstance(name, str)]
        own = [name for name in names if self.stream_of.get(name) == self.stream_of.get(names[0])]
        return own[::-1]

    def _stands_before_site(self, node: fx.Node) -> bool:
        return any(self.insertion.replaced.get(site.value) is node for site in self.insertion.sites.values())

    def _restore(self, node: fx.Node, before: fx.Node) -> fx.Node:
        labels = self.insertion.labels.of(node)
        batch_dim, token_dim = labels.batch_dim(), labels.token_dim()
        axis = token_axis(labels[token_dim])
        assert axis is not None
        names = self._sites_of_stream(labels)
        known = {name.removesuffix(SUFFIX) for name in names}
        places = {(s.token_dim, s.batch_dim) for s in self.insertion.plan.sites if s.name in known}
        if len(places) != 1 or next(iter(places))[1] != batch_dim or len(labels) != 3:
            raise AxisError("every position is needed where the tokens stand in another dimension than at the sites")
        site_dim, _ = next(iter(places))
        sites = [self.insertion.sites[name] for name in names]
        earlier: list[tuple[fx.Node, fx.Node | None]] = [(site.value, site.state) for site in sites]
        if sites[0].state is not None:
            # The stream began with tokens that another one had pruned: what was dropped there enters all the same.
            earlier.insert(0, (self.with_all_tokens(sites[0].block_input, before), None))
        state = self.insertion.state(axis.source, before)
        tokens = self._transposed(node, token_dim, site_dim, before)
        with self.insertion.graph.inserting_before(before):
            new = self.insertion.graph.call_function(runtime.restore, (tokens, state, site_dim, batch_dim, earlier))
        new.meta = dict(tokens.meta)
        self.sections.begin(new, axis.source, batch_dim, site_dim)
        result = self._transposed(new, site_dim, token_dim, before)
        self.sections.follow(result)
        return result

    def _transposed(self, node: fx.Node, first: int, second: int, before: fx.Node) -> fx.Node:
        """``node`` with two dimensions exchanged, or itself if they are the same."""
        if first == second:
            return node
        with self.insertion.graph.inserting_before(before):
            return emit(self.insertion.graph, torch.ops.aten.transpose.int, (node, first, second), node)

    def _recompute(self, node: fx.Node, before: fx.Node) -> fx.Node:
        old = node
        if node not in self.captured:
            old = next((old for old, new in self.insertion.replaced.items() if new is node), node)
        call = self.captured.get(old, CapturedCall())
        if call.operation in (None, attention, weigh):
            raise AxisError("every position is needed behind an operation that mixes tokens")
        args = fx.map_arg(call.args, lambda n: self._current(n, before))
        kwargs = fx.map_arg(call.kwargs, lambda n: self._current(n, before))
        with self.insertion.graph.inserting_before(before):
            new = self.insertion.graph.create_node("call_function", call.operation, args, kwargs)
        new.meta = dict(node.meta)
        set_record(new, replace(record(new), recomputed=node))
        self.sections.follow(new)
        return new

    def _current(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that replaces an operand of the captured graph, with all its tokens."""
        return self.with_all_tokens(self.insertion.current(node), before)


def _reaches_attention(node: fx.Node) -> bool:
    return any(is_attention(n) or n.op == "call_module" for n in descendants(node))
