"""Axis labels: which dimension of which tensor runs along which token axis.

Every dimension of a tensor is described by its *factors*, row-major: a plain dimension has one, a folded one (batch
times heads, say) has several. A factor is an axis or None (a dimension that does not matter to pruning), with its
size in the captured example. :func:`relabel_view` says how factors move through a view; the rule table (``table.py``)
covers all other operations. Sizes are compared as numbers of the example, never by symbol name: captures may give
equal sizes different symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rewriters.graph.nodes import AxisError


@dataclass(frozen=True)
class Axis:
    """An axis that is followed through the graph.

    ``source`` identifies what defines it: during insertion the node of the token state, during detection the name of
    the dimension that was seeded.
    """

    kind: Literal["batch", "tokens"]
    source: Any

    def __repr__(self) -> str:
        return f"{self.kind}({self.source})"


def roots(source: Any) -> frozenset[Any]:
    """The sources that a source was derived from: one for a part or a range of tokens, several for a concatenation."""
    if not isinstance(source, tuple):
        return frozenset((source,))
    if source[1] == "join":
        return frozenset().union(*(roots(parent) for parent in source[0] if parent is not None))
    return roots(source[0])


def is_joined(source: Any) -> bool:
    """Whether ``source`` is, or was derived from, a concatenation of token axes."""
    return isinstance(source, tuple) and (source[1] == "join" or is_joined(source[0]))


class Factor(NamedTuple):
    """One factor of a dimension: the axis it runs along (None if none) and its size in the example."""

    axis: Axis | None
    size: int


Dim = tuple[Factor, ...]
Labels = tuple[Dim, ...]


def plain(size: int) -> Dim:
    """A dimension that runs along no axis."""
    return (Factor(None, size),)


def unlabelled(shape: Sequence[int]) -> Labels:
    """Labels of a tensor without any axis."""
    return tuple(plain(n) for n in shape)


def axes_of(dim: Dim) -> tuple[Axis, ...]:
    """The axes among the factors of ``dim``."""
    return tuple(f.axis for f in dim if f.axis is not None)


def is_plain(dim: Dim) -> bool:
    """Whether ``dim`` runs along no axis."""
    return not axes_of(dim)


def has_tokens(dim: Dim) -> bool:
    """Whether ``dim`` runs along a token axis (alone or folded)."""
    return any(a.kind == "tokens" for a in axes_of(dim))


def token_axis(dim: Dim) -> Axis | None:
    """The token axis of ``dim``, None if there is none; raises if it is folded with other factors."""
    tokens = [a for a in axes_of(dim) if a.kind == "tokens"]
    if not tokens:
        return None
    if len([f for f in dim if f.size != 1 or f.axis is not None]) != 1:
        raise AxisError("the token axis is folded together with other dimensions")
    return tokens[0]


def any_tokens(labels: Labels) -> bool:
    """Whether any dimension runs along a token axis."""
    return any(has_tokens(d) for d in labels)


def dim_size(dim: Dim) -> int:
    """Size of ``dim`` in the example."""
    size = 1
    for factor in dim:
        size *= factor.size
    return size


def untracked(axis: Axis | None) -> bool:
    """Whether a factor runs along no axis."""
    return axis is None


def relabel_view(labels: Labels, shape: Sequence[int], divisible: Callable[[Axis | None], bool] = untracked) -> Labels:
    """Labels after a view (reshape, flatten, unflatten) to ``shape``, given in example sizes.

    Factors of ``divisible`` axes may be split and joined freely; others stay whole. Raises :class:`AxisError` where one
    would be cut.
    """
    factors = list(_join([f for dim in labels for f in dim if f.size != 1], divisible))
    result: list[Dim] = []
    for size in shape:
        taken: list[Factor] = []
        have = 1
        while have < size:
            if not factors:
                raise AxisError(f"a view to {tuple(shape)} does not match its input")
            head = factors.pop(0)
            need = size // have
            if size % (have * head.size) == 0:
                taken.append(head)
                have *= head.size
            elif divisible(head.axis) and size % have == 0 and head.size % need == 0:
                taken.append(Factor(head.axis, need))
                factors.insert(0, Factor(head.axis, head.size // need))
                have = size
            else:
                raise AxisError(
                    f"a view to {tuple(shape)} cuts through {head.axis or 'a dimension'} of size {head.size}"
                )
        result.append(_join(taken, divisible) or plain(1))
    if factors:
        raise AxisError(f"a view to {tuple(shape)} does not match its input")
    return tuple(result)


def _join(factors: list[Factor], divisible: Callable[[Axis | None], bool]) -> Dim:
    """Merge neighbouring factors of one axis that is divisible."""
    joined: list[Factor] = []
    for factor in factors:
        if joined and joined[-1].axis == factor.axis and divisible(factor.axis):
            joined[-1] = Factor(factor.axis, joined[-1].size * factor.size)
        else:
            joined.append(factor)
    return tuple(joined)


def seed(shape: tuple[int, ...], batch_dim: int, token_dim: int, source: object) -> Labels:
    """Labels of a residual value ``[B, N, C]``, ``[N, B, C]`` or ``[B, C, N]``."""
    result = [plain(n) for n in shape]
    result[batch_dim] = (Factor(Axis("batch", source), shape[batch_dim]),)
    result[token_dim] = (Factor(Axis("tokens", source), shape[token_dim]),)
    return tuple(result)
