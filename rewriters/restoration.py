"""Restoration: where a graph needs every position, scatter the tokens back to their places.

Start at :class:`Restoration`. Tokens are scattered back in the space of the residual stream, where the last state of
a dropped token means the same as that of a survivor; what the graph computes from there on, token by token, is
computed again for all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from madtp import state as runtime
from rewriters.axes import AxisError, any_tokens, axes_of, token_axis
from rewriters.outcomes import Align, batch_dim_of, labels_of, op_name

if TYPE_CHECKING:
    from rewriters.insert import Insertion

NORMS = frozenset(("layer_norm", "rms_norm"))


class Restoration:
    """Restores values of one graph under insertion."""

    def __init__(self, done: Insertion, post_norm: frozenset[str]) -> None:
        """``post_norm``: the sites of post-norm blocks, whose residual value is the output of a norm."""
        self.done = done
        self.post_norm = post_norm
        self.order = {node: position for position, node in enumerate(done.graph.nodes)}
        self.original = {node: (node.args, dict(node.kwargs)) for node in done.graph.nodes}
        self.users = {node: list(node.users) for node in done.graph.nodes}
        self.anchors: set[fx.Node] = set()
        self.restored: dict[fx.Node, fx.Node] = {}
        self.tainted: set[fx.Node] = set()

    def remember(self, node: fx.Node) -> None:
        """Taint what is computed from restored values."""
        if any(operand in self.tainted for operand in node.all_input_nodes):
            self.tainted.add(node)

    def note(self, node: fx.Node) -> None:
        """Learn whether ``node`` is a value of a residual stream: an add whose one operand descends from the other."""
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
        operands = [a for a in self.original[node][0][:2] if isinstance(a, fx.Node)]
        if len(operands) == 2 and (self._descends(*operands) or self._descends(*reversed(operands))):
            self.anchors.add(node)

    def _is_post_norm(self, labels: Any) -> bool:
        sources = [a.source for dim in labels for a in axes_of(dim) if a.kind == "tokens"]
        return any(source in self.post_norm for source in sources)

    def _descends(self, node: fx.Node, ancestor: fx.Node) -> bool:
        limit = self.order.get(ancestor, 1 << 60)
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current is ancestor:
                return True
            for operand in self._original_inputs(current):
                if operand not in seen and self.order.get(operand, -1) >= limit:
                    seen.add(operand)
                    stack.append(operand)
        return False

    def _original_inputs(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.map_arg(self.original.get(node, ((), {})), lambda n: found.append(n))
        return found

    def before(self, node: fx.Node, reason: str, sources: set[str]) -> None:
        """Feed ``node`` with restored operands; refuse if what it computes goes on to an attention."""
        from rewriters.insert import InsertRefusal

        if self._reaches_attention(node):
            raise InsertRefusal(node, reason, sources)
        for operand in list(node.all_input_nodes):
            labels = self.done.labels.get(operand)
            if labels is None or not _labelled(labels):
                continue
            try:
                node.replace_input_with(operand, self.full(operand, node))
            except AxisError as error:
                raise InsertRefusal(node, f"{reason}; {error}", sources) from error
        self.tainted.add(node)

    def check_side(self, align: Align, node: fx.Node, sources: set[str]) -> None:
        """A restored value may not flow back into pruned tokens: the dropped ones would take part again."""
        from rewriters.insert import InsertRefusal

        if align.operand in self.tainted:
            raise InsertRefusal(node, "restored tokens flow back into the pruned stream", sources)

    def _reaches_attention(self, node: fx.Node) -> bool:
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if op_name(current) == "attention" or (current.op == "call_module"):
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
        if site is not None or node in self.anchors:
            result = self._restore(node, before)
        else:
            result = self._recompute(node, before)
        self.restored[node] = result
        return result

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
        if isinstance(axis.source, tuple):
            raise AxisError("tokens of a part of the batch cannot be restored")
        sites = reversed(self.done.labels.chain(axis.source))
        earlier = [self.done.before_site[name] for name in sites]
        state = self.done.state(axis.source, before)
        with self.done.graph.inserting_before(before):
            new = self.done.graph.call_function(runtime.restore, (node, state, token_dim, batch_dim, earlier))
        new.meta = dict(node.meta)
        return new

    def _recompute(self, node: fx.Node, before: fx.Node) -> fx.Node:
        if node.op != "call_function" or op_name(node) == "attention" or node not in self.original:
            raise AxisError("every position is needed behind an operation that mixes tokens")
        args, kwargs = self.original[node]
        new_args = fx.map_arg(args, lambda n: self._current(n, before))
        new_kwargs = fx.map_arg(kwargs, lambda n: self._current(n, before))
        with self.done.graph.inserting_before(before):
            new = self.done.graph.create_node("call_function", node.target, new_args, new_kwargs)
        new.meta = {**node.meta, "again": node}
        return new

    def _current(self, node: fx.Node, before: fx.Node) -> Any:
        """What stands for an operand of the captured graph now, with all its tokens."""
        if node in self.done.before_site_values():
            return self.full(self.done.replaced[node], before)
        if node in self.done.replaced:
            node = self.done.replaced[node]
        return self.full(node, before)


def _labelled(labels: Any) -> bool:
    first = labels[0] if labels else ()
    if first and isinstance(first[0], tuple) and not hasattr(first[0], "axis"):
        return any(any_tokens(one) for one in labels)
    return any_tokens(labels)
