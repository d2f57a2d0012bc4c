"""Sources: what a token axis comes from.

An axis begins at an *origin*: a site, by its name; a stream, by its index; or a seed of an analysis, by a name such as
"probe". All other sources are derived from origins by operations that cut or join tokens or samples. Sources are
hashable, and equal sources mean the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from rewriters.graph.nodes import call_argument, example_shape, known_size

Origin: TypeAlias = str | int
# A border of a range: a position (negative from the end), a node that computes it, or None for an open end.
Bound: TypeAlias = int | fx.Node | None


@dataclass(frozen=True)
class Rest:
    """All tokens of ``parent`` but the first ``start``."""

    parent: Source
    start: int


@dataclass(frozen=True)
class TokenRange:
    """Tokens of ``parent`` from ``start`` to ``end``, as a slice counts them."""

    parent: Source
    start: Bound
    end: Bound


@dataclass(frozen=True)
class BatchPart:
    """All tokens of some entries of the batch, or of repeated entries.

    Attributes:
        parent: Source of the whole batch.
        operation: Operation that cuts or repeats the batch.
        arguments: Its further arguments, spelled out: equal cuts of one state share a state.
        number: Which of the operation's results this is.
    """

    parent: Source
    operation: str
    arguments: str
    number: int


@dataclass(frozen=True)
class Concatenation:
    """Tokens of several tensors, one after the other.

    Attributes:
        parents: Source of each operand; None where its tokens belong to no axis that is followed.
        node: The concatenation.
    """

    parents: tuple[Source | None, ...]
    node: fx.Node


Cut: TypeAlias = Rest | TokenRange | BatchPart
Derived: TypeAlias = Cut | Concatenation
Source: TypeAlias = Origin | Derived


def parents(source: Source) -> tuple[Source, ...]:
    """The sources that ``source`` is derived from directly; none for an origin."""
    if isinstance(source, Concatenation):
        return tuple(parent for parent in source.parents if parent is not None)
    return (source.parent,) if isinstance(source, Cut) else ()


def roots(source: Source) -> frozenset[Origin]:
    """The origins of ``source``: one for a cut, several for a concatenation of different streams."""
    if isinstance(source, Derived):
        return frozenset().union(*map(roots, parents(source)))
    return frozenset((source,))


def are_alike(first: Source, second: Source) -> bool:
    """Whether two sources have the same tokens in the same order: those of keys and values, concatenated with as many
    others."""
    if not isinstance(first, Concatenation) or not isinstance(second, Concatenation):
        return first == second
    return first.parents == second.parents and _other_sizes(first) == _other_sizes(second)


def _other_sizes(joined: Concatenation) -> list[object]:
    """How many tokens that are not followed each operand of a concatenation adds."""
    operands = [n for n in call_argument(joined.node, 0, "tensors", ()) if example_shape(n) != (0,)]
    dim = call_argument(joined.node, 1, "dim", 0)
    parts = zip(operands, joined.parents, strict=True)
    return [known_size(n.meta["val"].shape[dim]) if parent is None else None for n, parent in parts]


def is_joined(source: Source) -> bool:
    """Whether ``source`` is, or is derived from, a concatenation of token axes."""
    return isinstance(source, Concatenation) or (isinstance(source, Cut) and is_joined(source.parent))
