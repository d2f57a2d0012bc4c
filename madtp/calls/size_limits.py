"""Limits of a capture: the conditions on its free sizes under which Python takes the branches that were captured.

Start at :class:`SizeLimits`. A model may ask how long its input is (``if length > window``); its capture holds one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    import sympy

Expression: TypeAlias = "sympy.Basic"


class SizePosition(NamedTuple):
    """Where the inputs of a call hold a size: a dimension of a leaf, or the leaf itself (``dim`` is None)."""

    leaf: int
    dim: int | None


@dataclass(frozen=True)
class SizeLimits:
    """Conditions on the sizes of a call.

    Attributes:
        conditions: expressions in the symbols of a capture.
        symbols: the symbols, each with the size that it stands for.
    """

    conditions: tuple[Expression, ...] = ()
    symbols: tuple[tuple[Expression, SizePosition], ...] = ()

    def allow(self, leaves: Sequence[Any]) -> bool:
        """Return whether all conditions hold for the sizes of ``leaves``."""
        sizes = (
            (symbol, leaves[place.leaf] if place.dim is None else leaves[place.leaf].shape[place.dim])
            for symbol, place in self.symbols
        )
        return _hold(self.conditions, tuple(sizes))


@lru_cache(maxsize=1024)
def _hold(conditions: tuple[Expression, ...], sizes: tuple[tuple[Expression, int], ...]) -> bool:
    known = dict(sizes)
    # What stays undecided is asked of values, not of sizes.
    return not any(condition.xreplace(known) == False for condition in conditions)  # noqa: E712


def limits_of(inputs: Mapping[int, object]) -> SizeLimits:
    """Return the limits of a capture.

    Args:
        inputs: its (fake) inputs by leaf, before anything else has asked for their sizes.
    """
    places: dict[Expression, SizePosition] = {}
    guards: list[Expression] = []
    for leaf, value in inputs.items():
        sizes: Iterable[tuple[int | None, object]]
        sizes = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                guards = guards or ([] if environment is None else [guard.expr for guard in environment.guards])
                places.setdefault(size.node._expr, SizePosition(leaf, dim))
    symbols = {symbol: place for symbol, place in places.items() if symbol.is_symbol}
    asked = {c for c in guards if c.free_symbols and c.free_symbols <= symbols.keys()}
    used = set().union(*(condition.free_symbols for condition in asked))
    conditions = tuple(sorted(asked, key=str))
    return SizeLimits(conditions, tuple((s, place) for s, place in symbols.items() if s in used))
