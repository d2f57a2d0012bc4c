"""Benchmarks: what a pruned model saves in time, measured fairly.

Start at :func:`time_interleaved` (``timing.py``): runs take turns in one process, so that a disturbance affects all alike.
``result.py`` holds what was measured and the ratios that follow from it, ``table.py`` and ``plot.py`` show them, ``memory.py``
finds the peak of a call and ``environment.py`` says on what machine it was. ``generation.py`` and ``generation_table.py``
do the same for models that generate. Nothing here knows a model; ``zoo/benchmark`` builds the runs of ``madtp bench``.
"""

from __future__ import annotations

from madtp.benchmark.environment import Environment, describe_environment
from madtp.benchmark.memory import peak_memory
from madtp.benchmark.result import BenchmarkResult, Clock, Comparison, Measurement, compare
from madtp.benchmark.spread import Spread, spread_of
from madtp.benchmark.timing import Limits, Round, Run, Seconds, Stopwatch, median_seconds, time_interleaved

__all__ = [
    "BenchmarkResult",
    "Clock",
    "Comparison",
    "Environment",
    "Limits",
    "Measurement",
    "Round",
    "Run",
    "Seconds",
    "Spread",
    "Stopwatch",
    "compare",
    "describe_environment",
    "median_seconds",
    "peak_memory",
    "spread_of",
    "time_interleaved",
]
