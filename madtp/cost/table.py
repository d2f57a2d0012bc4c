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
from typing import NamedTuple

import sympy
import torch
from torch import Tensor

from madtp.calls.batch import batch_size
from madtp.cost.counts import Size, StreamSize, TokenCount, TokenCounts, evaluate_size
from madtp.tokens.state import TokenState


@dataclass(frozen=True, kw_only=True)
class CostTerm:
    """One operation: ``constant * product(sizes) * sum over entries of product over axes of tokens[axis][entry]``.

    Attributes:
        path: Module path.
        constant: What does not depend on the call.
        sizes: Symbolic sizes, and names of sizes that :meth:`CostTable.bind` gives a value.
        axes: Counts along the token axes; empty if the operation runs along none (then the batch is among ``sizes``).
        only_active: Whether it counts only while pruning is on.
        guidance: Whether it belongs to the comparison of tokens with the alignment tokens.
    """

    path: str
    constant: float
    sizes: tuple[Size | str, ...] = ()
    axes: tuple[TokenCount, ...] = ()
    only_active: bool = False
    guidance: bool = False


class InputSize(NamedTuple):
    """Where a call says how large a symbol is: a leaf of its inputs and a dimension of that."""

    leaf: int
    dim: int


@dataclass
class CostTable:
    """All priced operations of a program.

    Attributes:
        terms: The operations.
        symbols: Where to read the size of each symbol.
        streams: Size of each site's stream, by site.
        named: Values of named sizes.
    """

    terms: list[CostTerm] = field(default_factory=list)
    symbols: dict[sympy.Symbol, InputSize] = field(default_factory=dict)
    streams: dict[str, StreamSize] = field(default_factory=dict)
    named: dict[str, float] = field(default_factory=dict)

    def under(self, place: Callable[[str], str], added: str) -> CostTable:
        """The table with module paths moved by ``place``, but for what lies under the name ``added``."""
        terms = [t if t.path.split(".")[0] == added else replace(t, path=place(t.path)) for t in self.terms]
        return replace(self, terms=terms)

    def bind(self, name: str, value: float) -> None:
        """Give a named size its value."""
        self.named[name] = value

    def entries(self, site: str, leaves: Sequence[object]) -> int:
        """Entries of the batch of a site's stream: samples, or a multiple of them (two images each, frames)."""
        return int(evaluate_size(self.streams[site].entries, self._bound(leaves)))

    def _bound(self, leaves: Sequence[object]) -> dict[sympy.Symbol, int]:
        bound = {}
        for symbol, place in self.symbols.items():
            leaf = leaves[place.leaf]
            assert isinstance(leaf, Tensor)
            bound[symbol] = leaf.shape[place.dim]
        return bound

    def price(
        self,
        leaves: Sequence[object],
        counts: Mapping[str, Tensor],
        active: bool,
        states: Mapping[str, TokenState] | None = None,
        *,
        guided: bool = True,
    ) -> dict[str, float]:
        """MACs per sample by module path.

        Args:
            leaves: Flattened inputs, for the sizes.
            counts: Tokens ``[entries]`` after each site; a site left out keeps everything.
            active: Whether pruning is on (its own cost counts).
            states: Token states after each site, where they are known; they tell which tokens a range holds.
            guided: Whether sites that prune compare their tokens with the alignment tokens.
        """
        bound = self._bound(leaves)
        batch = batch_size(leaves)
        tokens = TokenCounts(streams=self.streams, kept=counts, states=states or {}, bound=bound)
        total: dict[str, float] = {}
        for term in self.terms:
            if (term.only_active and not active) or (term.guidance and not guided):
                continue
            amount = term.constant
            for size in term.sizes:
                amount *= self.named.get(size, 1.0) if isinstance(size, str) else evaluate_size(size, bound)
            if term.axes:
                amount *= float(reduce(torch.mul, map(tokens.of, term.axes)).sum())
            total[term.path] = total.get(term.path, 0.0) + amount / batch
        return total
