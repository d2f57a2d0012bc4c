"""Excursions: pieces of a pruned stream's blocks that run on all tokens, since they read the grid.

Start at :class:`Excursions`. Restoration (``restoration.py``) puts all tokens back in front of such a piece, and where its
result joins the stream again it is gathered at the kept positions, as any side input is. In between dropped tokens stand with
their last state: a convolution sees them so. Attention does not: it is followed (``axes/grid.py``) where the tokens of its keys
stand, and those that were dropped are hidden.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from madtp.tokens import grid as runtime
from rewriters.axes.grid import Known, Lost, Moves, start, track
from rewriters.axes.labels import is_plain
from rewriters.canonicalise.attention import SOFTMAXES, looks_like_attention
from rewriters.graph.nodes import AxisError, example_shape, op_name
from rewriters.insert.workspace import Insertion

# Steps of attention maps that keep a spelling of their own.
MAPS = frozenset(("shares", "total", "weigh"))


class Excursions:
    """What runs on all tokens of pruned streams in a graph under insertion."""

    def __init__(self, done: Insertion) -> None:
        self.done = done
        self.known: dict[fx.Node, Known] = {}
        self.hidden: set[fx.Node] = set()

    def begin(self, node: fx.Node, source: Any, batch_dim: int, token_dim: int) -> None:
        """``node`` holds all tokens of a residual value that is along the state ``source``."""
        self.known[node] = start(example_shape(node), batch_dim, token_dim, source)

    def follow(self, node: fx.Node) -> None:
        """Learn where tokens stand in a node that runs on all of them."""
        if node in self.done.labels or node in self.known or node.op != "call_function":
            return
        found = track(node, self.known)
        if found is not None:
            self.known[node] = found

    def close(self, inside: list[fx.Node]) -> None:
        """Hide dropped tokens from the attention among ``inside``, whose results join the pruned stream again.

        Raises:
            AxisError: it cannot be followed where the keys stand, or the spelling of the attention is not known.
        """
        for node in inside:
            weighs = op_name(node) in SOFTMAXES and isinstance(self.known.get(node), Lost)
            if weighs or looks_like_attention(node) or op_name(node) in MAPS:
                raise AxisError(f"attention in a spelling that is not known ({node.name}) runs on all tokens")
            if op_name(node) != "attention" or node in self.hidden:
                continue
            self.hidden.add(node)
            visible = self.visible(node)
            if visible is None:
                continue
            if len(node.args) > 5 and node.args[5]:
                raise AxisError(f"causal attention ({node.name}) runs on all tokens")
            mask = node.kwargs.get("present_mask") or node.args[3]
            with self.done.graph.inserting_before(node):
                new = self.done.graph.call_function(runtime.hide, (mask, visible))
            if node.kwargs.get("present_mask") is not None:
                node.update_kwarg("present_mask", new)
            else:
                node.update_arg(3, new)

    def visible(self, attention: fx.Node, source: Any = None) -> fx.Node | None:
        """Which keys of an attention node are alive, ``[B', 1, K, 1]``; None if no token was dropped from among them, or each
        of them is a mixture. ``source``: the state of the stream; None for any."""
        key: Any = attention.args[1]
        known = self.known.get(key)
        if known is None:
            return None
        if isinstance(known, Lost):
            raise AxisError(f"it is not known which keys of {attention.name} are dropped tokens: {known.reason}")
        if known.labels is None or known.moves is None or is_plain(known.labels[2]):
            return None
        shape = example_shape(key)
        _, heads, _, width = known.labels
        sizes = known.moves.shape
        if not (is_plain(heads) and is_plain(width)) or (sizes[0], sizes[2]) != (shape[0], shape[2]):
            raise AxisError(
                f"keys of {attention.name} stand for more than one token, or heads are folded into the batch"
            )
        base = known.moves
        while base.before is not None:
            base = base.before
        state, batch_dim, token_dim = base.details
        if (
            source is not None
            and source not in self.done.labels.chain(state)
            and state not in self.done.labels.chain(source)
        ):
            return None
        with self.done.graph.inserting_before(attention):
            arguments = (self.done.state(state, attention), base.shape, batch_dim, token_dim)
            return self.carry(known.moves, self.done.graph.call_function(runtime.survivors_on_grid, arguments))

    def carry(self, moves: Moves, base: fx.Node) -> fx.Node:
        """A number for each token, ``base``, at the places where ``moves`` lead, at the graph's insertion point."""
        if moves.before is None:
            return base
        inner = self.carry(moves.before, base)
        graph = self.done.graph
        if moves.kind == "view":
            assert moves.like is not None
            like = self.done.replaced.get(moves.like, moves.like)
            if like in self.done.labels:
                raise AxisError(f"tokens are missing at {like.name}, which says how they are moved")
            return graph.call_function(runtime.regroup, (inner, like, moves.beside))
        if moves.kind == "permute":
            return graph.call_function(runtime.reorder, (inner, moves.details))
        return graph.call_function(runtime.take, (inner, *moves.details))
