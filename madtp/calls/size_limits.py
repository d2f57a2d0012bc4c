"""Limits of a capture: the conditions on its free sizes under which the model's Python goes the way that was captured.

Start at :class:`Limits`. A model may ask how long its input is (``if length > window``); its capture holds one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int | None]


@dataclass(frozen=True)
class Limits:
    """Conditions in symbols (expressions of sympy), and where the symbols stand: as a dimension of an input leaf,
    or the leaf itself (None)."""

    conditions: tuple[Any, ...] = ()
    places: tuple[tuple[Any, Place], ...] = ()

    def allow(self, leaves: Sequence[Any]) -> bool:
        """Whether all conditions hold for the sizes of ``leaves``."""
        sizes = ((s, leaves[at] if dim is None else leaves[at].shape[dim]) for s, (at, dim) in self.places)
        return _hold(self.conditions, tuple(sizes))


@lru_cache(maxsize=1024)
def _hold(conditions: tuple[Any, ...], sizes: tuple[tuple[Any, int], ...]) -> bool:
    known = dict(sizes)
    # What stays undecided is asked of values, not of sizes.
    return not any(condition.xreplace(known) == False for condition in conditions)  # noqa: E712


def limits_of(inputs: Mapping[int, Any]) -> Limits:
    """The limits of a capture, from its (fake) inputs by leaf, read before anything else asks for their sizes."""
    places: dict[Any, Place] = {}
    guards: list[Any] = []
    for at, value in inputs.items():
        sizes: Any = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt):
                environment: Any = size.node.shape_env
                guards = guards or [guard.expr for guard in environment.guards]
                places.setdefault(size.node._expr, (at, dim))
    symbols = {symbol: place for symbol, place in places.items() if symbol.is_symbol}
    asked = {c for c in guards if c.free_symbols and c.free_symbols <= symbols.keys()}
    used = set().union(*(condition.free_symbols for condition in asked))
    conditions = tuple(sorted(asked, key=str))
    return Limits(conditions, tuple((s, place) for s, place in symbols.items() if s in used))
