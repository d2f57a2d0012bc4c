"""Token counts: how many tokens stand along an axis, as a formula over the counts at the sites.

Start at :data:`TokenCount`; :class:`TokenCounts` evaluates formulas for one call. A count has an entry for each entry of
the batch, ``[entries]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import sympy
import torch
from torch import Tensor

from madtp.tokens.state import TokenState

# A size as a number, or as an expression over the sizes of the inputs.
Size: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class SiteCount:
    """Tokens that a site keeps; all tokens of its stream in a call in which it prunes nothing."""

    site: str


@dataclass(frozen=True)
class FullCount:
    """All tokens of a site's stream."""

    site: str


@dataclass(frozen=True)
class RestCount:
    """All tokens of ``parent`` but the first ``start``."""

    parent: TokenCount
    start: int


@dataclass(frozen=True)
class RangeCount:
    """Tokens of ``parent`` from ``start`` to ``end``, as a slice counts them.

    Which tokens survive decides how many of them are in a range; from counts alone they are taken to be spread evenly.
    """

    parent: TokenCount
    start: Size | None
    end: Size | None


@dataclass(frozen=True)
class BatchPartCount:
    """The entries of ``parent`` from ``first`` to ``last``, as fractions of the batch."""

    parent: TokenCount
    first: float
    last: float


@dataclass(frozen=True)
class RepeatedCount:
    """Each entry of ``parent`` ``times`` times in a row."""

    parent: TokenCount
    times: int


@dataclass(frozen=True)
class ConcatenationCount:
    """Tokens of several tensors, one after the other; a parent of None is an unpruned tensor of that length."""

    parents: tuple[TokenCount | None, ...]
    lengths: tuple[Size, ...]


TokenCount: TypeAlias = (
    SiteCount | FullCount | RestCount | RangeCount | BatchPartCount | RepeatedCount | ConcatenationCount
)


class StreamSize(NamedTuple):
    """Tokens of a stream and entries of its batch, before anything is pruned."""

    tokens: Size
    entries: Size


@dataclass(frozen=True)
class TokenCounts:
    """Evaluates token counts for one call.

    Attributes:
        streams: Size of each site's stream, by site.
        kept: Tokens ``[entries]`` after each site; a site left out keeps everything.
        states: Token states after each site, where they are known; they tell which tokens a range holds.
        bound: The size in this call of each symbol.
        evaluated: What was evaluated so far.
    """

    streams: Mapping[str, StreamSize]
    kept: Mapping[str, Tensor]
    states: Mapping[str, TokenState]
    bound: Mapping[sympy.Symbol, int]
    evaluated: dict[TokenCount, Tensor] = field(default_factory=dict)

    def of(self, count: TokenCount) -> Tensor:
        """``count`` in this call, ``[entries]``; each is evaluated once."""
        if count not in self.evaluated:
            self.evaluated[count] = self._evaluate(count)
        return self.evaluated[count]

    def _evaluate(self, count: TokenCount) -> Tensor:
        match count:
            case SiteCount(site):
                return self.kept[site].double().cpu() if site in self.kept else self._full(site)
            case FullCount(site):
                return self._full(site)
            case RestCount(parent, start):
                return self.of(parent) - start
            case RangeCount():
                return self._in_range(count)
            case BatchPartCount(parent, first, last):
                whole = self.of(parent)
                return whole[round(first * len(whole)) : round(last * len(whole))]
            case RepeatedCount(parent, times):
                return self.of(parent).repeat_interleave(times)
            case ConcatenationCount(parents, lengths):
                parts = zip(parents, lengths, strict=True)
                return torch.as_tensor(sum(self._size(n) if parent is None else self.of(parent) for parent, n in parts))

    def _full(self, site: str) -> Tensor:
        size = self.streams[site]
        return torch.full((int(self._size(size.entries)),), self._size(size.tokens), dtype=torch.float64)

    def _in_range(self, count: RangeCount) -> Tensor:
        start, end = (b if b is None else int(self._size(b)) for b in (count.start, count.end))
        state = self.states.get(count.parent.site) if isinstance(count.parent, SiteCount) else None
        if state is not None and state.index is not None:
            first, last, _ = slice(start, end).indices(state.full_length)
            inside = (state.index >= first) & (state.index < last)
            return (inside if state.valid is None else inside & state.valid).sum(1).double().cpu()
        parent = self.of(count.parent)
        full = int(parent.amax()) if state is None else state.full_length
        return parent * (len(range(*slice(start, end).indices(full))) / max(1, full))

    def _size(self, size: Size) -> float:
        return evaluate_size(size, self.bound)


def evaluate_size(size: Size, bound: Mapping[sympy.Symbol, int]) -> float:
    """A size with its symbols bound to the sizes of a call."""
    return float(size) if isinstance(size, int) else float(size.subs(dict(bound)))
