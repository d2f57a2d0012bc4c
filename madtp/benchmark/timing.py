"""Time several runs in turns: :func:`time_interleaved`.

A *run* is one way to compute something. A *round* times every run on every batch. Runs take turns on each batch, in one order
in even rounds and in the reverse order in odd ones, so that none always follows the same other one.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from madtp.errors import ConfigError

FEWEST_ROUNDS = 3
"""Rounds that are timed even if the seconds are used up."""


def _nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Run:
    """One way to compute something.

    Attributes:
        name: identifies the run.
        call: what is timed; takes the number of a batch.
        prepare: runs before each call and is not timed.
        finish: runs after each call and is not timed.
    """

    name: str
    call: Callable[[int], object]
    prepare: Callable[[], None] = _nothing
    finish: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Limits:
    """How long to measure.

    Attributes:
        rounds: largest number of rounds that count, at least 1.
        warm_up: rounds before them, which do not count.
        seconds: no further round begins after so many seconds, but 3 are timed in any case; None for no such limit.

    Raises:
        ConfigError: a number is out of range.
    """

    rounds: int
    warm_up: int = 1
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warm_up < 0:
            raise ConfigError(
                f"rounds is {self.rounds} and warm_up {self.warm_up}; allowed: at least 1 round, and 0 or more to warm up"
            )


@dataclass(frozen=True)
class Seconds:
    """Time that passed.

    Attributes:
        wall: seconds by the clock.
        cpu: seconds of this process's threads together.
    """

    wall: float
    cpu: float


class Stopwatch:
    """Measures laps, from its making on."""

    def __init__(self) -> None:
        """Start."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def lap(self) -> Seconds:
        """Return the time since the lap before, and begin the next one."""
        wall, cpu = time.perf_counter(), time.process_time()
        passed = Seconds(wall - self._wall, cpu - self._cpu)
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return passed


@dataclass(frozen=True)
class Round:
    """What one round took.

    Attributes:
        number: counted from 0, those to warm up included.
        warm_up: whether it does not count.
        taken: time of each run, the mean over the batches.
    """

    number: int
    warm_up: bool
    taken: Mapping[str, Seconds]


def time_interleaved(runs: Sequence[Run], batches: int, limits: Limits) -> Iterator[Round]:
    """Yield rounds as they end. Garbage is collected before each round, not while it is timed.

    Args:
        runs: take turns; their names differ.
        batches: each run is called with the numbers below it in every round.
        limits: how long to measure.
    """
    begun = time.perf_counter()
    for number in range(limits.warm_up + limits.rounds):
        timed = number - limits.warm_up
        late = limits.seconds is not None and time.perf_counter() - begun > limits.seconds
        if late and timed >= FEWEST_ROUNDS:
            return
        gc.collect()
        sums = {run.name: [0.0, 0.0] for run in runs}
        for batch in range(batches):
            for run in reversed(runs) if number % 2 else runs:
                seconds = _time_once(run, batch)
                sums[run.name][0] += seconds.wall / batches
                sums[run.name][1] += seconds.cpu / batches
        yield Round(number, timed < 0, {name: Seconds(*taken) for name, taken in sums.items()})


def _time_once(run: Run, batch: int) -> Seconds:
    run.prepare()
    collecting = gc.isenabled()
    gc.disable()
    try:
        watch = Stopwatch()
        run.call(batch)
        seconds = watch.lap()
    finally:
        if collecting:
            gc.enable()
    run.finish()
    return seconds


def _without_number(call: Callable[[], object], number: int) -> object:
    return call()


def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median wall-clock seconds of calls that take turns, after one round to warm up.

    Args:
        calls: What is timed, by name.
        rounds: Number of rounds that count; each calls all of them once.

    Returns:
        Seconds of one call, by name.
    """
    runs = [Run(name, partial(_without_number, call)) for name, call in calls.items()]
    timed = [r.taken for r in time_interleaved(runs, 1, Limits(rounds)) if not r.warm_up]
    return {name: statistics.median(taken[name].wall for taken in timed) for name in calls}
