"""The search for a saving of time: :func:`search_time`.

Time follows multiply-accumulates (MACs), but less of it is saved. So a reduction of MACs is searched for at which the time
falls as wanted, in a few steps of the search for MACs (``search.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from madtp.benchmark.timing import median_seconds
from madtp.calls.call import Call
from madtp.errors import CalibrationError
from madtp.pruned import PrunedModel
from madtp.tuning.search import Knob, Search

ROUNDS = 5
"""Rounds of dense and pruned calls in turns, of which the medians count."""
STEPS = 6
"""Most reductions of MACs that are tried."""
MOST = 0.97
"""Largest reduction of MACs that is tried."""
MAC_TOLERANCE = 0.01


@dataclass(frozen=True)
class Timing:
    """What a batch takes.

    Attributes:
        dense: seconds without pruning.
        pruned: seconds with it.
    """

    dense: float
    pruned: float

    @property
    def reduction(self) -> float:
        """Fraction of the dense time that is saved; negative if pruning takes longer."""
        return 1.0 - self.pruned / self.dense


def search_time(
    pruned: PrunedModel, calls: list[Call], knob: Knob, *, target: float, tolerance: float
) -> tuple[Search, Timing]:
    """Set a knob so that the time of all batches falls by ``target``; the model is left there.

    Args:
        pruned: in eval mode.
        calls: the batches.
        knob: the setting.
        target: fraction of the dense time to save.
        tolerance: how far it may be off.

    Returns:
        The search for the MACs at which it does, and the time there.

    Raises:
        CalibrationError: the time cannot be saved.
    """
    macs, tried = target, list[tuple[float, float]]()
    for _ in range(STEPS):
        search = Search(pruned, calls, knob, target=macs, tolerance=MAC_TOLERANCE)
        try:
            best = search.run()
        except CalibrationError as error:
            raise CalibrationError(
                f"{target:.1%} less time cannot be reached: it would take {macs:.1%} fewer MACs. {error} {_told(tried)}"
            ) from error
        timing = _time(pruned, calls)
        if abs(timing.reduction - target) <= tolerance:
            return search, timing
        tried.append((best.reduction, timing.reduction))
        if macs >= MOST and timing.reduction < target:
            break
        macs = min(max(_next(tried, target), 0.01), MOST)
    raise CalibrationError(
        f"{target:.1%} less time within {tolerance:.1%} was not reached on batches of these sizes. {_told(tried)}"
    )


def _told(tried: list[tuple[float, float]]) -> str:
    shown = ", ".join(f"{seconds:.1%} less at {saved:.1%} fewer MACs" for saved, seconds in tried)
    measured = f"Measured: {shown}. " if tried else ""
    return f"{measured}Larger batches or inputs, a larger tolerance or a quieter machine would help."


def _next(tried: list[tuple[float, float]], target: float) -> float:
    """The reduction of MACs to try next: along the line through the two nearest measurements, or one of slope 1."""
    ranked = sorted(tried, key=lambda point: abs(point[1] - target))
    macs, seconds = ranked[0]
    slope = 1.0
    if len(ranked) > 1 and ranked[1][0] != macs:
        # Noise must not turn the line around.
        slope = min(max((ranked[1][1] - seconds) / (ranked[1][0] - macs), 0.3), 3.0)
    return macs + (target - seconds) / slope


def _time(pruned: PrunedModel, calls: list[Call]) -> Timing:
    def run() -> None:
        for call in calls:
            pruned(*call.args, **call.kwargs)

    def run_dense() -> None:
        with pruned.madtp.dense():
            run()

    with pruned.madtp.aside():
        medians = median_seconds({"dense": run_dense, "pruned": run}, ROUNDS)
    return Timing(medians["dense"], medians["pruned"])
