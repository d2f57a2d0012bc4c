"""Dense sections: pieces of a pruned stream's blocks that run on all tokens, since they read the grid.

Start at :class:`DenseSections`. Restoration (``restoration.py``) puts all tokens back in front of such a section. Where its
result joins the stream again, it is gathered at the kept positions, as any side input is. Inside the section dropped
tokens keep their last state: a convolution sees them so. Attention does not: the section is tracked (``axes/grid.py``) to
learn where the tokens of its keys stand, and those that were dropped are hidden.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from madtp.tokens import grid as runtime
from rewriters.axes.grid import track
from rewriters.axes.labels import is_plain
from rewriters.axes.sources import Source
from rewriters.axes.token_moves import (
    GridTokens,
    Permuted,
    Regrouped,
    TokenMoves,
    TrackedValue,
    Tracking,
    Unmoved,
    UntrackedValue,
    start,
)
from rewriters.canonicalise.attention import is_unrecognised
from rewriters.graph.nodes import AxisError, example_shape, op_name, operand
from rewriters.graph.op_sets import MAP_STEPS, SOFTMAXES
from rewriters.insert.workspace import Insertion


class DenseSections:
    """What runs on all tokens of pruned streams in a graph under insertion.

    Attributes:
        tracked: Where tokens are in the values of the sections.
        handled: Attention nodes whose dropped keys are hidden already.
    """

    def __init__(self, insertion: Insertion) -> None:
        self.insertion = insertion
        self.tracked: dict[fx.Node, Tracking] = {}
        self.handled: set[fx.Node] = set()

    def begin(self, node: fx.Node, source: Source, batch_dim: int, token_dim: int) -> None:
        """``node`` holds all tokens of a residual value that is along the state ``source``."""
        self.tracked[node] = start(example_shape(node), batch_dim, token_dim, source)

    def follow(self, node: fx.Node) -> None:
        """Find where tokens are in a node that runs on all of them."""
        if node in self.insertion.labels or node in self.tracked or node.op != "call_function":
            return
        found = track(node, self.tracked)
        if found is not None:
            self.tracked[node] = found

    def hide_dropped(self, section: Iterable[fx.Node]) -> None:
        """Hide dropped tokens from the attention in ``section``, whose result joins the pruned stream again.

        Raises:
            AxisError: It is not known where the keys stand, or the spelling of the attention is not known.
        """
        for node in section:
            weighs = op_name(node) in SOFTMAXES and isinstance(self.tracked.get(node), UntrackedValue)
            if weighs or is_unrecognised(node) or op_name(node) in MAP_STEPS:
                raise AxisError(f"attention in a spelling that is not known ({node.name}) runs on all tokens")
            if op_name(node) != "attention" or node in self.handled:
                continue
            self.handled.add(node)
            alive = self.alive_keys(node)
            if alive is not None:
                self._mask(node, alive)

    def _mask(self, attention: fx.Node, alive: fx.Node) -> None:
        if len(attention.args) > 5 and attention.args[5]:
            raise AxisError(f"causal attention ({attention.name}) runs on all tokens")
        present_mask = attention.kwargs.get("present_mask")
        with self.insertion.graph.inserting_before(attention):
            new = self.insertion.graph.call_function(runtime.hide, (present_mask or attention.args[3], alive))
        if present_mask is not None:
            attention.update_kwarg("present_mask", new)
        else:
            attention.update_arg(3, new)

    def alive_keys(self, attention: fx.Node, source: Source | None = None) -> fx.Node | None:
        """Which keys of an attention node are alive, ``[B', 1, K, 1]``.

        Args:
            attention: The attention node.
            source: The state of the stream whose keys count; None for any.

        Returns:
            None if no token was dropped from among the keys, or each of them is a mixture.
        """
        key = operand(attention, 1)
        tracked = self.tracked.get(key)
        if tracked is None:
            return None
        if isinstance(tracked, UntrackedValue):
            raise AxisError(f"it is not known which keys of {attention.name} are dropped tokens: {tracked.reason}")
        if tracked.labels is None or tracked.moves is None or is_plain(tracked.labels[2]):
            return None
        self._require_single_tokens(attention, key, tracked, tracked.moves)
        base = _unmoved(tracked.moves)
        assert base.tokens is not None
        if source is not None and not self._same_stream(source, base.tokens):
            return None
        tokens, graph = base.tokens, self.insertion.graph
        with graph.inserting_before(attention):
            arguments = (
                self.insertion.state(tokens.source, attention),
                base.shape,
                tokens.batch_dim,
                tokens.token_dim,
            )
            return self.move(graph.call_function(runtime.survivors_on_grid, arguments), tracked.moves)

    def _require_single_tokens(
        self, attention: fx.Node, key: fx.Node, tracked: TrackedValue, moves: TokenMoves
    ) -> None:
        assert tracked.labels is not None
        _, heads, _, width = tracked.labels
        shape = example_shape(key)
        if not (is_plain(heads) and is_plain(width)) or (moves.shape[0], moves.shape[2]) != (shape[0], shape[2]):
            raise AxisError(
                f"keys of {attention.name} stand for more than one token, or heads are folded into the batch"
            )

    def _same_stream(self, source: Source, tokens: GridTokens) -> bool:
        chain = self.insertion.labels.chain
        return source in chain(tokens.source) or tokens.source in chain(source)

    def move(self, numbers: fx.Node, moves: TokenMoves) -> fx.Node:
        """A number for each token at the places where ``moves`` lead, at the graph's insertion point."""
        if isinstance(moves, Unmoved):
            return numbers
        before = self.move(numbers, moves.before)
        graph = self.insertion.graph
        if isinstance(moves, Regrouped):
            like = self.insertion.current(moves.like)
            if like in self.insertion.labels:
                raise AxisError(f"tokens are missing at {like.name}, which says how they are moved")
            return graph.call_function(runtime.regroup, (before, like, moves.plain_sizes))
        if isinstance(moves, Permuted):
            return graph.call_function(runtime.reorder, (before, moves.order))
        return graph.call_function(runtime.take, (before, moves.operation, moves.arguments))


def _unmoved(moves: TokenMoves) -> Unmoved:
    """Where ``moves`` begin."""
    while not isinstance(moves, Unmoved):
        moves = moves.before
    return moves
