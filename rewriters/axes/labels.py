"""Axis labels: which dimension of which tensor runs along which token axis.

Start at :class:`Labels`. Every dimension of a tensor is described by its *factors*, row-major: a plain dimension has
one, a folded one (batch times heads, say) has several. A factor is an axis or None (a dimension that does not matter to
pruning), with its size in the captured example. :func:`relabel_view` says how factors move through a view; the rule
table (``table.py``) covers all other operations. Sizes are compared as numbers of the example, never by symbol name:
captures may give equal sizes different symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import fx

from rewriters.axes.sources import Source
from rewriters.graph.nodes import AxisError, example_shape


@dataclass(frozen=True)
class Axis:
    """An axis that is followed through the graph.

    Attributes:
        kind: Whether it counts samples or tokens.
        source: What its tokens come from; the batch of these tokens has the same source.
    """

    kind: Literal["batch", "tokens"]
    source: Source

    def __repr__(self) -> str:
        return f"{self.kind}({self.source})"


class Factor(NamedTuple):
    """One factor of a dimension: the axis it runs along (None if none) and its size in the example."""

    axis: Axis | None
    size: int


Dim = tuple[Factor, ...]


def plain(size: int) -> Dim:
    """A dimension that runs along no axis."""
    return (Factor(None, size),)


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


def dim_size(dim: Dim) -> int:
    """Size of ``dim`` in the example."""
    size = 1
    for factor in dim:
        size *= factor.size
    return size


class Labels(tuple[Dim, ...]):
    """Labels of one tensor: what each of its dimensions runs along."""

    __slots__ = ()

    def any_tokens(self) -> bool:
        """Whether any dimension runs along a token axis."""
        return any(map(has_tokens, self))

    def token_dim(self) -> int:
        """The first dimension that runs along a token axis; raises if there is none or it is folded with others."""
        for position, dim in enumerate(self):
            if token_axis(dim) is not None:
                return position
        raise AxisError("no dimension runs along tokens")

    def batch_dim(self) -> int:
        """The dimension that is the batch; raises if there is none or it is folded with others."""
        for position, dim in enumerate(self):
            if any(a.kind == "batch" for a in axes_of(dim)):
                if len(dim) > 1:
                    raise AxisError("the batch is folded together with other dimensions")
                return position
        raise AxisError("a token axis stands without its batch")

    def batch_and_heads(self) -> tuple[int, int]:
        """The dimension that is the batch, alone or in front of heads, and the number of heads folded into it."""
        for position, dim in enumerate(self):
            if any(a.kind == "batch" for a in axes_of(dim)):
                if dim[0].axis is None or dim[0].axis.kind != "batch" or has_tokens(dim):
                    raise AxisError("the batch is folded together with other dimensions")
                return position, dim_size(dim[1:])
        raise AxisError("a token axis stands without its batch")

    def token_sources(self) -> list[Source]:
        """The sources of all token axes, in the order of the dimensions."""
        return [axis.source for dim in self for axis in axes_of(dim) if axis.kind == "tokens"]

    def with_dim(self, position: int, dim: Dim) -> Labels:
        """Labels whose entry at ``position`` is ``dim``."""
        return Labels((*self[:position], dim, *self[position + 1 :]))

    def without_dim(self, position: int) -> Labels:
        """Labels without the entry at ``position``."""
        return Labels((*self[:position], *self[position + 1 :]))


class ResultLabels(tuple[Labels, ...]):
    """Labels of an operation with several results, those of each."""

    __slots__ = ()

    def any_tokens(self) -> bool:
        """Whether any dimension of any result runs along a token axis."""
        return any(labels.any_tokens() for labels in self)

    def token_sources(self) -> list[Source]:
        """The sources of all token axes, in the order of the results and their dimensions."""
        return [source for labels in self for source in labels.token_sources()]


class LabelMap(dict[fx.Node, Labels | ResultLabels]):
    """Labels by node; a node that is missing runs along no axis."""

    def of(self, node: object) -> Labels:
        """Labels of a node that is one tensor."""
        if not isinstance(node, fx.Node):
            raise TypeError(f"{node!r} is not a tensor")
        known = self.get(node)
        return known if isinstance(known, Labels) else unlabelled(example_shape(node))

    def tensor(self, node: object) -> Labels | None:
        """Labels of a node that is one tensor, None if it has none."""
        known = self.get(node) if isinstance(node, fx.Node) else None
        return known if isinstance(known, Labels) else None

    def newer(self, first: Axis, second: Axis) -> Axis | None:
        """The later of two states of one stream; None if they have nothing to do with each other."""
        return None


def unlabelled(shape: Sequence[int]) -> Labels:
    """Labels of a tensor without any axis."""
    return Labels(plain(n) for n in shape)


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
    return Labels(result)


def _join(factors: list[Factor], divisible: Callable[[Axis | None], bool]) -> Dim:
    """Merge neighbouring factors of one axis that is divisible."""
    joined: list[Factor] = []
    for factor in factors:
        if joined and joined[-1].axis == factor.axis and divisible(factor.axis):
            joined[-1] = Factor(factor.axis, joined[-1].size * factor.size)
        else:
            joined.append(factor)
    return tuple(joined)


def seed(shape: Sequence[int], batch_dim: int, token_dim: int, source: Source) -> Labels:
    """Labels of a residual value ``[B, N, C]``, ``[N, B, C]`` or ``[B, C, N]``."""
    result = [plain(n) for n in shape]
    result[batch_dim] = (Factor(Axis("batch", source), shape[batch_dim]),)
    result[token_dim] = (Factor(Axis("tokens", source), shape[token_dim]),)
    return Labels(result)
