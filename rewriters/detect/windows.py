"""Windows: attention in which the tokens of a residual stream do not attend to each of them.

Start at :func:`scores_on_grid`: queries and keys are taken in windows of the grid, or computed by convolutions.
:func:`has_mixed_keys`: each token asks, but the keys are mixtures of tokens. :func:`moves_to_residual` leads from the windows
back to the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from madtp.sites.scoring import Scores
from rewriters.axes.grid import is_grid_of, track
from rewriters.axes.token_moves import BATCH, TOKENS, TokenMoves, TrackedValue, Tracking, Unmoved, start
from rewriters.graph.nodes import example_shape, op_name, operand


class HasTokenDims(Protocol):
    """The dimensions of batch and tokens in a residual value."""

    @property
    def batch_dim(self) -> int: ...
    @property
    def token_dim(self) -> int: ...


@dataclass(frozen=True)
class AttentionSpan:
    """The part of a graph in which the tokens of an attention sublayer are followed.

    Attributes:
        nodes: all nodes, in the order of the graph.
        block_input: the residual value that the queries come from.
        attention: the attention.
        value: the residual value after the sublayer.
    """

    nodes: Sequence[fx.Node]
    block_input: fx.Node
    attention: fx.Node
    value: fx.Node

    def tracked_inside(self, dims: HasTokenDims) -> dict[fx.Node, Tracking]:
        """Where tokens are, from the block's input to its attention."""
        first = start(example_shape(self.block_input), dims.batch_dim, dims.token_dim, "block")
        return self._track({self.block_input: first}, self.block_input, self.attention)

    def tracked_behind(self, known: Tracking | None) -> Tracking | None:
        """Where the tokens of the attention's output, at first as in ``known``, are in the residual value."""
        if not isinstance(known, TrackedValue) or known.labels is None:
            return None
        sizes = tuple(
            1 if all(f.axis is None for f in dim) else n
            for dim, n in zip(known.labels, example_shape(self.attention), strict=True)
        )
        first = TrackedValue(known.labels, Unmoved(sizes))
        return self._track({self.attention: first}, self.attention, self.value).get(self.value)

    def _track(self, known: dict[fx.Node, Tracking], first: fx.Node, last: fx.Node) -> dict[fx.Node, Tracking]:
        for node in self.nodes:
            found = track(node, known) if first < node else None
            if found is not None:
                known[node] = found
            if node is last:
                break
        return known


def has_mixed_keys(span: AttentionSpan, dims: HasTokenDims) -> bool:
    """Whether the keys are mixtures of the tokens of the block's input."""
    if op_name(span.attention) != "attention":
        return False
    key = span.tracked_inside(dims).get(operand(span.attention, 1))
    return is_grid_of(key) and isinstance(key, TrackedValue) and key.moves is None


def scores_on_grid(span: AttentionSpan, dims: HasTokenDims) -> Scores | None:
    """Which tokens of a residual stream attention on a grid scores; None if it is not attention of these tokens."""
    if op_name(span.attention) != "attention":
        return None
    known = span.tracked_inside(dims)
    query, key = (known.get(operand(span.attention, n)) for n in (0, 1))
    if not (
        isinstance(query, TrackedValue) and isinstance(key, TrackedValue) and is_grid_of(query) and is_grid_of(key)
    ):
        return None
    residual = span.tracked_behind(known.get(span.attention))
    if not isinstance(residual, TrackedValue) or not _is_residual(residual, dims):
        return None
    alike = query.moves is not None and query.moves == key.moves and span.attention.kwargs.get("windows") is None
    return "windows" if alike and residual.moves is not None else "none"


def moves_to_residual(span: AttentionSpan, dims: HasTokenDims) -> TokenMoves | None:
    """The moves that bring a number for each key, ``[B', 1, K, 1]``, to the tokens of the residual value."""
    residual = span.tracked_behind(span.tracked_inside(dims).get(span.attention))
    return residual.moves if isinstance(residual, TrackedValue) else None


def _is_residual(known: TrackedValue, dims: HasTokenDims) -> bool:
    """Whether batch and tokens stand where they do in the residual stream."""
    if known.labels is None:
        return False
    axes = [[f.axis for f in dim if f.axis is not None] for dim in known.labels]
    return (
        len(axes) == 3 and axes[dims.batch_dim] == [BATCH] and axes[dims.token_dim] == [TOKENS] and axes.count([]) == 1
    )
