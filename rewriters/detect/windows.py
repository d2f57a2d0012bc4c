"""Windows: attention of a residual stream's tokens that is not attention of each token to each.

Start at :func:`scores_on_grid`: queries and keys are taken in windows of the grid, or computed by convolutions.
:func:`condenses_own`: each token asks, but the keys are mixtures of tokens. :func:`way_home` leads from the windows back.
"""

from __future__ import annotations

from typing import Protocol

from torch import fx

from madtp.sites.scoring import Scores
from rewriters.axes.grid import BATCH, TOKENS, TokenMoves, TrackedValue, Tracking, Unmoved, is_grid_of, start, track
from rewriters.graph.nodes import example_shape, op_name


class Places(Protocol):
    """Where batch and tokens stand in a residual value."""

    @property
    def batch_dim(self) -> int: ...
    @property
    def token_dim(self) -> int: ...


def condenses_own(
    attention: fx.Node, block_input: fx.Node, nodes: list[fx.Node], batch_dim: int, token_dim: int
) -> bool:
    """Whether the keys are mixtures of the tokens of ``block_input``."""
    if op_name(attention) != "attention":
        return False
    known = _inside(attention, block_input, nodes, batch_dim, token_dim)
    key = known.get(attention.args[1])  # type: ignore[arg-type]
    return is_grid_of(key) and isinstance(key, TrackedValue) and key.moves is None


def scores_on_grid(
    attention: fx.Node, block_input: fx.Node, value: fx.Node, nodes: list[fx.Node], batch_dim: int, token_dim: int
) -> Scores | None:
    """What attention on a grid tells of the tokens of a residual stream; None if it is not attention of these tokens."""
    if op_name(attention) != "attention":
        return None
    known = _inside(attention, block_input, nodes, batch_dim, token_dim)
    query, key = (known.get(n) for n in attention.args[:2])  # type: ignore[arg-type]
    if not is_grid_of(query) or not is_grid_of(key):
        return None
    home = _home(attention, known.get(attention), nodes, value)
    if not _is_home(home, batch_dim, token_dim):
        return None
    assert isinstance(query, TrackedValue)
    assert isinstance(key, TrackedValue)
    assert isinstance(home, TrackedValue)
    alike = query.moves is not None and query.moves == key.moves
    return "windows" if alike and home.moves is not None else "none"


def way_home(
    nodes: list[fx.Node], attention: fx.Node, block_input: fx.Node, value: fx.Node, places: Places
) -> TokenMoves | None:
    """How what is known of each key ``[B', 1, K, 1]`` gets to the places of the tokens in ``value``."""
    known = _inside(attention, block_input, nodes, places.batch_dim, places.token_dim)
    home = _home(attention, known.get(attention), nodes, value)
    return home.moves if isinstance(home, TrackedValue) else None


def _inside(
    attention: fx.Node, block_input: fx.Node, nodes: list[fx.Node], batch_dim: int, token_dim: int
) -> dict[fx.Node, Tracking]:
    """Where tokens stand from the block's input to its attention."""
    known: dict[fx.Node, Tracking] = {block_input: start(example_shape(block_input), batch_dim, token_dim, "block")}
    _follow(known, nodes, block_input, attention)
    return known


def _home(attention: fx.Node, known: Tracking | None, nodes: list[fx.Node], value: fx.Node) -> Tracking | None:
    """Where the tokens of the attention's output stand in ``value``."""
    if not isinstance(known, TrackedValue) or known.labels is None:
        return None
    sizes = tuple(
        1 if all(f.axis is None for f in dim) else n
        for dim, n in zip(known.labels, example_shape(attention), strict=True)
    )
    behind: dict[fx.Node, Tracking] = {attention: TrackedValue(known.labels, Unmoved(sizes))}
    _follow(behind, nodes, attention, value)
    return behind.get(value)


def _follow(known: dict[fx.Node, Tracking], nodes: list[fx.Node], first: fx.Node, last: fx.Node) -> None:
    begun = False
    for node in nodes:
        if begun:
            found = track(node, known)
            if found is not None:
                known[node] = found
        begun = begun or node is first
        if node is last:
            return


def _is_home(known: Tracking | None, batch_dim: int, token_dim: int) -> bool:
    if not isinstance(known, TrackedValue) or known.labels is None:
        return False
    axes = [[f.axis for f in dim if f.axis is not None] for dim in known.labels]
    return len(axes) == 3 and axes[batch_dim] == [BATCH] and axes[token_dim] == [TOKENS] and axes.count([]) == 1
