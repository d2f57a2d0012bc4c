"""Median and quartiles of repeated measurements: :func:`spread_of`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from madtp.errors import DataError


@dataclass(frozen=True)
class Spread:
    """Where the middle half of the values lies.

    Attributes:
        median: the median.
        low: first quartile.
        high: third quartile.
        count: number of values.
    """

    median: float
    low: float
    high: float
    count: int


def spread_of(values: Sequence[float]) -> Spread:
    """Return median and quartiles, interpolated between values.

    Raises:
        DataError: there are no values.
    """
    if not values:
        raise DataError("there are no values to take a median of; measure at least one round.")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))
