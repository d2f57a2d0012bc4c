"""Kinds of mutation as tables of numbers: whoever draws the numbers of a :class:`Kind` has a mutation.

So hypothesis (:func:`strategy`) and a seeded generator (:func:`drawn`) share one table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Whole:
    """The whole numbers from ``low`` to ``high``."""

    low: int
    high: int


@dataclass(frozen=True)
class Kind:
    """A kind of mutation.

    Attributes:
        make: makes the mutation from a number of each range, and a mutation of the inner kinds where there are some.
        ranges: of the numbers.
        inner: kinds of the mutation inside this one.
    """

    make: Callable[..., Any]
    ranges: tuple[Whole, ...] = ()
    inner: tuple[Kind, ...] = ()


PLACE = Whole(0, 2**20 - 1)
"""A place in something, taken modulo its length."""

EARLY = Whole(0, 255)
"""A place near the start, where formats have their headers."""

CHOICE = Whole(0, 255)
"""An entry of a table, taken modulo its length."""


def drawn(kinds: Sequence[Kind], random: Random) -> Any:
    """Draw a mutation of one of the kinds."""
    kind = random.choice(kinds)
    numbers = [random.randint(one.low, one.high) for one in kind.ranges]
    return kind.make(*numbers, *([drawn(kind.inner, random)] if kind.inner else []))


def strategy(kinds: Sequence[Kind]) -> st.SearchStrategy[Any]:
    """Return the strategy of the mutations of the kinds."""
    return st.one_of(*map(_strategy, kinds))


def _strategy(kind: Kind) -> st.SearchStrategy[Any]:
    numbers = [st.integers(one.low, one.high) for one in kind.ranges]
    return st.builds(kind.make, *numbers, *([strategy(kind.inner)] if kind.inner else []))
