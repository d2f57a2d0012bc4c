"""Which numbers a setting takes: :class:`Range`, :func:`check_numbers`.

A class of settings has a table with a range for each of its numbers, and checks it when it is made. So NaN, a sign too much or
a few zeros too many are an error before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from madtp.errors import ConfigError

LARGEST_COUNT = 10**9
LARGEST_SEED = 2**32 - 1
LARGEST_WEIGHT = 10**6
MOST_PROCESSES = 1024
"""Threads or processes. Tens of thousands end the program without a message where the system allows fewer."""


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``.

    Attributes:
        low: smallest number.
        high: largest number.
        whole: whether only whole numbers count.
        above: whether ``low`` itself is left out.
        below: whether ``high`` itself is left out.
        optional: whether None counts, too.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False
    optional: bool = False

    def __contains__(self, value: object) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        outside = (self.above and value == self.low) or (self.below and value == self.high)
        return self.low <= value <= self.high and not outside

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = f"{'above' if self.above else 'of at least'} {self.low:,}"
        high = f"{'below' if self.below else 'at most'} {self.high:,}"
        return f"{kind} {low} and {high}{', or none' if self.optional else ''}"


def whole(low: int, high: int = LARGEST_COUNT) -> Range:
    """Return the range of the whole numbers from ``low`` to ``high``."""
    return Range(low, high, whole=True)


SEED = whole(0, LARGEST_SEED)
SHARE = Range(0, 1)
PART = Range(0, 1, above=True, below=True)
WEIGHT = Range(0, LARGEST_WEIGHT)


def check_numbers(settings: object, ranges: Mapping[str, Range], owner: str = "") -> None:
    """Check the numbers of settings.

    Args:
        settings: an object with an attribute for each name.
        ranges: what each may be, by name.
        owner: table of settings that messages name, such as ``"training"``; "" for none.

    Raises:
        ConfigError: a value is no number, NaN, or out of its range.
    """
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if value not in allowed:
            shown = f"{owner}.{name}" if owner else name
            raise ConfigError(f"{shown} is {_shortened(value)}; it has to be {allowed}.")


def _shortened(value: object) -> str:
    # Whole numbers of thousands of digits have no decimal form.
    return f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >= 10**30 else repr(value)
