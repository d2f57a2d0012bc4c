"""The cost model: multiply-accumulates as a closed form of the token counts at each site.

Start at :class:`CostTable`; ``madtp.count_macs`` is the public entry. Convention of the field: one
multiply-accumulate counts once and is what papers print as a "FLOP"; besides matrix products and convolutions a
normalisation counts 5 per element (4 without affine parameters), as fvcore, with which the published figures were
made, counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor

from madtp.calls.batch import batch_size
from madtp.tokens.state import TokenState

Source = Any


@dataclass(frozen=True)
class CostTerm:
    """One operation: ``constant * product(sizes) * sum over entries of product over axes of tokens[axis][entry]``.

    path: module path. sizes: symbolic sizes. axes: sources of the token axes; empty if the operation runs along none
    (then the batch is among ``sizes``).
    """

    path: str
    operation: str
    constant: float
    sizes: tuple[Any, ...] = ()
    axes: tuple[Source, ...] = ()
    only_active: bool = False


@dataclass(frozen=True)
class Part:
    """How the counts of a derived state follow from another: entries [first, last) as fractions, minus ``less``
    tokens, each ``times`` times."""

    parent: Source
    first: float
    last: float
    less: int = 0
    times: int = 1


@dataclass(frozen=True)
class Range:
    """Tokens of ``parent`` from ``start`` to ``end`` (numbers or symbolic, as a slice has them).

    Which tokens survive decides how many of them are in a range; from counts alone they are taken to be spread evenly.
    """

    parent: Source
    start: Any
    end: Any


@dataclass(frozen=True)
class Join:
    """Tokens of several streams one after the other; a parent of None is an unpruned stream of that length."""

    parents: tuple[Source | None, ...]
    lengths: tuple[Any, ...]


@dataclass
class CostTable:
    """All priced operations of a program.

    symbols: which input leaf and dimension binds a symbol. lengths: symbolic token count and batch of each site's
    stream.
    """

    terms: list[CostTerm] = field(default_factory=list)
    symbols: dict[Any, tuple[int, int]] = field(default_factory=dict)
    lengths: dict[Source, tuple[Any, Any]] = field(default_factory=dict)
    parts: dict[Source, Part] = field(default_factory=dict)
    ranges: dict[Source, Range] = field(default_factory=dict)
    joins: dict[Source, Join] = field(default_factory=dict)
    named: dict[str, float] = field(default_factory=dict)

    def under(self, place: Callable[[str], str], added: str) -> CostTable:
        """The table with module paths moved by ``place``, but for what lies under the name ``added``."""
        terms = [t if t.path.split(".")[0] == added else replace(t, path=place(t.path)) for t in self.terms]
        return replace(self, terms=terms)

    def bind(self, name: str, value: float) -> None:
        """Give a named size its value."""
        self.named[name] = value

    def entries(self, site: str, leaves: Sequence[Any]) -> int:
        """Entries of the batch of a site's stream: samples, or a multiple of them (two images each, frames)."""
        return int(evaluate_size(self.lengths[site][1], self._bound(leaves)))

    def _bound(self, leaves: Sequence[Any]) -> dict[Any, int]:
        return {symbol: leaves[leaf].shape[dim] for symbol, (leaf, dim) in self.symbols.items()}

    def price(
        self,
        leaves: Sequence[Any],
        counts: Mapping[str, Tensor],
        active: bool,
        states: Mapping[str, TokenState] | None = None,
    ) -> dict[str, float]:
        """MACs per sample by module path.

        Args:
            leaves: flattened inputs, for the sizes.
            counts: tokens ``[entries]`` after each site; a site left out keeps everything.
            active: whether pruning is on (its own cost counts).
            states: token states after each site, where they are known; they tell which tokens a range holds.
        """
        bound = self._bound(leaves)
        batch = batch_size(leaves)
        tokens = _Tokens(self, counts, bound, {} if states is None else states)
        total: dict[str, float] = {}
        for term in self.terms:
            if term.only_active and not active:
                continue
            amount = term.constant
            for size in term.sizes:
                amount *= self.named.get(size, 1.0) if isinstance(size, str) else evaluate_size(size, bound)
            if term.axes:
                amount *= float(reduce(torch.mul, map(tokens.of, term.axes)).sum())
            total[term.path] = total.get(term.path, 0.0) + amount / batch
        return total


@dataclass(frozen=True)
class _Tokens:
    """Tokens [entries] along each axis in one call; each is worked out once and kept in ``known``."""

    table: CostTable
    counts: Mapping[str, Tensor]
    bound: Mapping[Any, int]
    states: Mapping[str, TokenState]
    known: dict[Source, Tensor] = field(default_factory=dict)

    def of(self, source: Source) -> Tensor:
        """Tokens along the axis of ``source``."""
        if source not in self.known:
            self.known[source] = self._count(source)
        return self.known[source]

    def _count(self, source: Source) -> Tensor:
        table = self.table
        if source in table.ranges:
            return self._in_range(table.ranges[source])
        if source in table.joins:
            join = table.joins[source]
            parts = zip(join.parents, join.lengths, strict=True)
            return torch.as_tensor(sum(self._size(n) if parent is None else self.of(parent) for parent, n in parts))
        if source in table.parts:
            part = table.parts[source]
            parent = self.of(part.parent)
            first, last = round(part.first * len(parent)), round(part.last * len(parent))
            return (parent[first:last] - part.less).repeat_interleave(part.times)
        if isinstance(source, str) and source in self.counts:
            return self.counts[source].double().cpu()
        name = source[1] if isinstance(source, tuple) and source[0] == "before" else source
        length, batch = map(self._size, table.lengths[name])
        return torch.full((int(batch),), length, dtype=torch.float64)

    def _in_range(self, part: Range) -> Tensor:
        start, end = (b if b is None else int(self._size(b)) for b in (part.start, part.end))
        state = self.states.get(part.parent) if isinstance(part.parent, str) else None
        if state is not None and state.index is not None:
            first, last, _ = slice(start, end).indices(state.full_length)
            inside = (state.index >= first) & (state.index < last)
            return (inside if state.valid is None else inside & state.valid).sum(1).double().cpu()
        parent = self.of(part.parent)
        full = int(parent.amax()) if state is None else state.full_length
        share = len(range(*slice(start, end).indices(full))) / max(1, full)
        return parent * share

    def _size(self, size: Any) -> float:
        return evaluate_size(size, self.bound)


def evaluate_size(size: Any, bound: Mapping[Any, int]) -> float:
    """A symbolic size with its symbols bound to the sizes of a call."""
    if isinstance(size, (int, float)):
        return float(size)
    return float(sympy.sympify(size).subs(dict(bound)))
