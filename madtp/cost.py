"""The cost model: multiply-accumulates as a closed form of the token counts at each site.

Start at :class:`CostTable`; ``madtp.count_macs`` is the public entry. Convention of the field: one
multiply-accumulate counts once and is what papers print as a "FLOP"; besides matrix products and convolutions a
normalisation counts 5 per element (4 without affine parameters), as fvcore, with which the published figures were
made, counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

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
    named: dict[str, float] = field(default_factory=dict)

    def bind(self, name: str, value: float) -> None:
        """Give a named size its value."""
        self.named[name] = value

    def price(self, leaves: Sequence[Any], counts: Mapping[str, Tensor], active: bool) -> dict[str, float]:
        """MACs per sample by module path.

        Args:
            leaves: flattened inputs, for the sizes.
            counts: tokens ``[entries]`` after each site; a site left out keeps everything.
            active: whether pruning is on (its own cost counts).
        """
        bound = {symbol: leaves[leaf].shape[dim] for symbol, (leaf, dim) in self.symbols.items()}
        batch = next((int(x.shape[0]) for x in leaves if isinstance(x, Tensor) and x.dim()), 1)
        known: dict[Source, Tensor] = {}
        total: dict[str, float] = {}
        for term in self.terms:
            if term.only_active and not active:
                continue
            amount = term.constant
            for size in term.sizes:
                amount *= self.named.get(size, 1.0) if isinstance(size, str) else evaluate_size(size, bound)
            if term.axes:
                product: Tensor | None = None
                for axis in term.axes:
                    own = self._tokens(axis, counts, bound, known)
                    product = own if product is None else product * own
                assert product is not None
                amount *= float(product.sum())
            total[term.path] = total.get(term.path, 0.0) + amount / batch
        return total

    def _tokens(
        self, source: Source, counts: Mapping[str, Tensor], bound: Mapping[Any, int], known: dict[Source, Tensor]
    ) -> Tensor:
        if source in known:
            return known[source]
        if source in self.parts:
            part = self.parts[source]
            parent = self._tokens(part.parent, counts, bound, known)
            first, last = round(part.first * len(parent)), round(part.last * len(parent))
            result = (parent[first:last] - part.less).repeat_interleave(part.times)
        elif isinstance(source, str) and source in counts:
            result = counts[source].double().cpu()
        else:
            name = source[1] if isinstance(source, tuple) and source[0] == "before" else source
            length, batch = self.lengths[name]
            result = torch.full(
                (int(evaluate_size(batch, bound)),), float(evaluate_size(length, bound)), dtype=torch.float64
            )
        known[source] = result
        return result


def evaluate_size(size: Any, bound: Mapping[Any, int]) -> float:
    """A symbolic size with its symbols bound to the sizes of a call."""
    if isinstance(size, (int, float)):
        return float(size)
    return float(sympy.sympify(size).subs(dict(bound)))
