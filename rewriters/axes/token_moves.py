"""Token moves: where the tokens of a stream are in a value, before any is pruned.

Start at :class:`TrackedValue`. It says along what each dimension of a value runs, and by which :data:`TokenMoves` a number
for each token, ``[B, N]``, gets to the places of the tokens in it. ``grid.py`` follows values through operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from rewriters.axes.labels import Axis, Dim, Factor, Labels, plain
from rewriters.axes.sources import Source

BATCH = Axis("batch", "grid")
TOKENS = Axis("tokens", "grid")


@dataclass(frozen=True)
class GridTokens:
    """The tokens of a residual value: their source, and the dimensions of batch and tokens."""

    source: Source
    batch_dim: int
    token_dim: int


@dataclass(frozen=True)
class Unmoved:
    """A number for each token, ``[B, N]``.

    Attributes:
        shape: In the example; dimensions that run along no axis have size 1.
        tokens: Which tokens; None where that does not matter.
    """

    shape: tuple[int, ...]
    tokens: GridTokens | None = None


@dataclass(frozen=True)
class Regrouped:
    """What a view makes of ``before``.

    Attributes:
        before: What the view is taken of.
        shape: As that of :class:`Unmoved`.
        like: A value of the shape that the view leads to, but for dimensions that run along no axis.
        plain_sizes: Sizes, in each dimension of ``like``, of what runs along no axis.
    """

    before: TokenMoves
    shape: tuple[int, ...]
    like: fx.Node = field(compare=False)
    plain_sizes: tuple[int, ...] = field(compare=False)


@dataclass(frozen=True)
class Permuted:
    """``before`` with its dimensions in the order ``order``."""

    before: TokenMoves
    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Taken:
    """Entries of ``before``, taken from elsewhere by ``operation`` with the further arguments ``arguments``."""

    before: TokenMoves
    shape: tuple[int, ...]
    operation: OpOverload
    arguments: tuple[Argument, ...]


# How a number for each token is moved to the places that its token has in a value; equal moves are equal.
TokenMoves: TypeAlias = Unmoved | Regrouped | Permuted | Taken


@dataclass(frozen=True)
class TrackedValue:
    """A value that is computed from the tokens of a stream.

    Attributes:
        labels: Labels of its dimensions; None where they are not known.
        moves: How a number for each token gets to the places of its token in the value; None where places belong to no
            single token, since tokens were mixed.
        is_list: Whether it is a list of parts of a value like this.
    """

    labels: Labels | None
    moves: TokenMoves | None
    is_list: bool = False


@dataclass(frozen=True)
class UntrackedValue:
    """A value whose tokens could not be followed, and why."""

    reason: str


Tracking: TypeAlias = TrackedValue | UntrackedValue
MIXED = TrackedValue(None, None)


def start(shape: tuple[int, ...], batch_dim: int, token_dim: int, source: Source) -> TrackedValue:
    """The tokens of a residual value ``[B, N, C]``, ``[N, B, C]`` or ``[B, C, N]``; different tokens have different sources."""
    labels = [plain(n) for n in shape]
    labels[batch_dim] = (Factor(BATCH, shape[batch_dim]),)
    labels[token_dim] = (Factor(TOKENS, shape[token_dim]),)
    return TrackedValue(Labels(labels), Unmoved(axis_sizes(labels), GridTokens(source, batch_dim, token_dim)))


def axis_sizes(labels: Iterable[Dim]) -> tuple[int, ...]:
    """The sizes of what runs along an axis, of each dimension."""
    return tuple(math.prod(f.size for f in dim if f.axis is not None) for dim in labels)
