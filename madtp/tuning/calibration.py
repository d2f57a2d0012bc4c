"""Choose the pruning strength for a given saving: :func:`calibrate` on batches, :class:`GainController` while training.

Start at :func:`calibrate`. It searches one setting, the *knob*: the gain, on request the temperature, or the keep ratio of a
control with fixed counts. The search runs on a logarithmic scale. It first brackets the target and then shrinks the bracket.
MACs come from the cost table and the tokens that each sample really kept, so an evaluation is one forward of every batch.

A *reduction* is the fraction of the dense model's multiply-accumulates (MACs) that is saved: 0.8 leaves a fifth of them. What
pruning itself costs (alignment tokens) counts against it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from madtp.calls.call import Call, Inputs
from madtp.errors import CalibrationError, ConfigError
from madtp.pruned import PrunedModel
from madtp.pruned.arguments import check_pruned
from madtp.report import Savings
from madtp.tuning.batches import calls_of, evaluating
from madtp.tuning.break_even import break_even
from madtp.tuning.search import KNOBS, Knob, KnobName, Measurement, Search, dense_macs, has_nan, mac_reduction
from madtp.tuning.time_search import Timing, search_time

__all__ = ["CalibrationResult", "GainController", "calibrate", "dense_macs", "mac_reduction"]

log = logging.getLogger("madtp")
Objective = Literal["macs", "time"]
TOLERANCES: dict[str, float] = {"macs": 0.01, "time": 0.03}
"""How far the result may be off if the caller does not say, by objective."""


@dataclass(frozen=True)
class CalibrationResult:
    """What :func:`calibrate` found.

    Attributes:
        gain: the model's gain now.
        temperature: the model's temperature now.
        keep_ratio: the model's keep ratio now if it is a control with fixed counts, else None.
        reduction_reached: fraction of the dense MACs that is saved on the batches.
        dense_macs: MACs per sample without pruning.
        macs: MACs per sample now.
        samples: number of samples measured.
        deviation: standard error of the reduction over batches: how far the reduction may be off on as many other samples.
            None for fewer than 4 batches.
        evaluations: how often the batches were run.
        steer: the setting that was searched.
        time_reduction: fraction of the dense time that is saved; None where MACs were the objective.
        history: every evaluation, in order.
    """

    gain: float
    temperature: float
    keep_ratio: float | None
    reduction_reached: float
    dense_macs: float
    macs: float
    samples: int
    deviation: float | None
    evaluations: int
    steer: KnobName
    time_reduction: float | None
    history: tuple[Measurement, ...] = field(repr=False)

    def __str__(self) -> str:
        value = {"gain": self.gain, "temperature": self.temperature, "keep_ratio": self.keep_ratio}[self.steer]
        spread = "" if self.deviation is None else f" (standard error {self.deviation:.1%})"
        time = "" if self.time_reduction is None else f"{self.time_reduction:.1%} less time, "
        return (
            f"{time}{self.reduction_reached:.1%}{spread} fewer MACs ({self.dense_macs / 1e9:.4g} G dense, "
            f"{self.macs / 1e9:.4g} G pruned per sample) at {self.steer} {value:.5g}, on {self.samples} samples in "
            f"{self.evaluations} evaluations"
        )


def calibrate(
    pruned: PrunedModel,
    batches: Iterable[Inputs],
    *,
    reduction: float,
    objective: Objective = "macs",
    tolerance: float | None = None,
    steer: KnobName | None = None,
) -> CalibrationResult:
    """Set the pruning strength so that mean MACs, or the time, of ``batches`` fall by ``reduction``.

    The report then tells MACs before and after and the tokens that each site keeps (``pruned.madtp.report.savings``), and what
    each site costs and saves in time on the first batch (``pruned.madtp.report.balances``). The log names sites that cost more
    than they save.

    Args:
        pruned: a model from :func:`madtp.rewrite`. It is run in eval mode; its mode is restored.
        batches: inputs as the model takes them, dicts of keyword arguments or tuples of positional ones. All stay in memory.
        reduction: fraction of the dense MACs, or of the dense time, to save, above 0 and below 1 (0.8 saves 80%).
        objective: what is to fall: ``"macs"``, or ``"time"`` on this device, for batches of this size. Times are medians of
            dense and pruned calls in turns, so nothing else should run meanwhile.
        tolerance: how far the result may be off, as a fraction of the dense MACs (0.01 is one percentage point) or time. None
            takes 0.01 for MACs and 0.03 for time.
        steer: the setting to change. None takes ``"keep_ratio"`` where the configuration fixes one, else ``"gain"``.

    Returns:
        The settings that were found, which the model now has.

    Raises:
        ArgumentError: ``pruned`` is no pruned model.
        ConfigError: a value is out of range, or ``steer`` names a setting that has no effect here.
        ExampleInputsError: there are no batches, or they do not fit the model.
        CalibrationError: the reduction cannot be reached, or weights or outputs are NaN. The model's settings are unchanged.
    """
    check_pruned(pruned)
    if not isinstance(objective, str) or objective not in TOLERANCES:
        raise ConfigError(f"objective is {objective!r}; allowed: {', '.join(map(repr, TOLERANCES))}")
    tolerance = TOLERANCES[objective] if tolerance is None else tolerance
    for name, value in (("reduction", reduction), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
            raise ConfigError(
                f"{name} is {value!r}; allowed: a fraction above 0 and below 1 (0.8 saves 80% of the MACs)."
            )
    chosen = _knob(pruned, steer)
    calls = calls_of(pruned, batches)
    _refuse_nan_weights(pruned)
    before = chosen.read(pruned)
    found = False
    try:
        with torch.no_grad(), evaluating(pruned):
            if objective == "macs":
                search, timing = Search(pruned, calls, chosen, target=reduction, tolerance=tolerance), None
                search.run()
            else:
                search, timing = search_time(pruned, calls, chosen, target=reduction, tolerance=tolerance)
            best = search.history[-1]
            savings = _savings(pruned, search, timing)
            _balance_sites(pruned, calls[0])
        pruned.madtp.report.savings = savings
        found = True
    finally:
        if not found:
            chosen.write(pruned, before)
    return CalibrationResult(
        gain=pruned.madtp.gain,
        temperature=pruned.madtp.temperature,
        keep_ratio=pruned.madtp.config.keep_ratio,
        reduction_reached=best.reduction,
        dense_macs=search.dense,
        macs=best.macs,
        samples=search.samples,
        deviation=search.deviation(),
        evaluations=len(search.history),
        steer=chosen.name,
        time_reduction=None if timing is None else timing.reduction,
        history=tuple(search.history),
    )


def _savings(pruned: PrunedModel, search: Search, timing: Timing | None) -> Savings:
    """What the last evaluation of a search saved, for the report."""
    best = search.history[-1]
    return Savings(
        setting=search.knob.name,
        value=best.value,
        samples=search.samples,
        batches=len(search.calls),
        dense_macs=search.dense,
        macs=best.macs,
        deviation=search.deviation(),
        tokens=search.tokens.means(pruned),
        dense_seconds=None if timing is None else timing.dense,
        seconds=None if timing is None else timing.pruned,
    )


def _balance_sites(pruned: PrunedModel, call: Call) -> None:
    """Measure what sites cost and save, and name those that do not pay."""
    pruned.madtp.report.balances = break_even(pruned, call)
    losing = [balance for balance in pruned.madtp.report.balances if not balance.worthwhile]
    if losing:
        shown = ", ".join(f"{b.site} ({1000 * b.cost:.2f} ms against {1000 * b.saving:.2f})" for b in losing[:3])
        log.info(
            "%d of %d sites take more time than they save on batches like the first: %s%s. Larger batches or inputs help, or a "
            "plan without them: madtp.Plan.from_dict(pruned.madtp.report.plan).without([...])",
            len(losing),
            len(pruned.madtp.report.balances),
            shown,
            ", ..." if len(losing) > 3 else "",
        )


def _knob(pruned: PrunedModel, steer: KnobName | None) -> Knob:
    config = pruned.madtp.config
    name: str = ("gain" if config.keep_ratio is None else "keep_ratio") if steer is None else steer
    if name not in KNOBS:
        raise ConfigError(f"steer is {steer!r}; allowed: {', '.join(map(repr, KNOBS))}, None")
    if name != "keep_ratio" and config.keep_ratio is not None:
        raise ConfigError(
            f"steer is {name!r}, but keep_ratio={config.keep_ratio} fixes the counts; use steer='keep_ratio'."
        )
    if name == "keep_ratio" and config.keep_ratio is None:
        raise ConfigError(
            "steer is 'keep_ratio', but the configuration has none; it belongs to the controls selection='random' and "
            "'class_attention'. Use steer='gain'."
        )
    if name == "temperature" and not config.alignment:
        raise ConfigError("steer is 'temperature', which has no effect without alignment tokens; use steer='gain'.")
    if pruned.madtp.control.static_counts:
        raise ConfigError(
            "the model has fixed counts at each site, which no setting changes; calibrate it before freezing."
        )
    if name != "temperature" and not pruned.madtp.control.active:
        raise ConfigError(
            "temperature is 0, which switches pruning off; set pruned.madtp.temperature (1.0, say) first."
        )
    return KNOBS[name]


def _refuse_nan_weights(pruned: PrunedModel) -> None:
    bad = [name for name, value in pruned.state_dict().items() if has_nan(value)]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise CalibrationError(f"{len(bad)} tensors of the model hold NaN ({shown}); load good weights.")


class GainController:
    """Steers the gain during training so that the MAC reduction follows a target: integral control of log(gain).

    After every step, log(gain) moves by ``rate * (target - smoothed reduction)``. A target that cannot be reached drives the
    gain to a bound and no further. The controller is deterministic; ``state_dict`` and ``load_state_dict`` resume it exactly.

    Args:
        target: fraction of the dense MACs to save. It may be changed between steps.
        gain: start value.
        rate: change of log(gain) per step and unit of error. It does not overshoot while rate times the slope of the
            reduction over log(gain), which is 1 to 9, stays below ``(1 - smoothing) / 4``. A little overshoot is harmless.
        smoothing: weight of the past in the exponential mean of observed reductions, in [0, 1).
        bounds: smallest and largest gain.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        target: float,
        *,
        gain: float = 1.0,
        rate: float = 0.01,
        smoothing: float = 0.9,
        bounds: tuple[float, float] = (0.05, 20.0),
    ) -> None:
        low, high = bounds
        if not 0.0 < low < high < math.inf:
            raise ConfigError(f"bounds are {bounds!r}; allowed: two positive numbers, the smaller first")
        if not rate > 0.0 or not 0.0 <= smoothing < 1.0:
            raise ConfigError(
                f"rate is {rate!r} and smoothing {smoothing!r}; allowed: rate above 0, smoothing in [0, 1)"
            )
        self.target, self.rate, self.smoothing, self.bounds = target, rate, smoothing, (low, high)
        self.gain = min(max(gain, low), high)
        self.observed: float | None = None

    def step(self, reduction: float) -> float:
        """Take in the reduction of one training step (:func:`mac_reduction`).

        Returns:
            The gain for the next step.

        Raises:
            ConfigError: the target is not a fraction of at least 0 and below 1.
            CalibrationError: ``reduction`` is not finite.
        """
        if not 0.0 <= self.target < 1.0:
            raise ConfigError(f"target is {self.target!r}; allowed: a fraction of at least 0 and below 1")
        if not math.isfinite(reduction):
            raise CalibrationError(
                f"the observed reduction is {reduction!r}; the MACs of the last step are not finite."
            )
        past = reduction if self.observed is None else self.observed
        self.observed = self.smoothing * past + (1.0 - self.smoothing) * reduction
        moved = self.gain * math.exp(self.rate * (self.target - self.observed))
        self.gain = min(max(moved, self.bounds[0]), self.bounds[1])
        return self.gain

    def state_dict(self) -> dict[str, float | None]:
        """All state that changes, as JSON types."""
        return {"target": self.target, "gain": self.gain, "observed": self.observed}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Continue from the state that :meth:`state_dict` gave.

        Raises:
            ConfigError: keys are missing or unknown.
        """
        if set(state) != {"target", "gain", "observed"} or state["target"] is None or state["gain"] is None:
            raise ConfigError(f"the state of a gain controller has target, gain and observed; got {sorted(state)}")
        self.target, self.gain, self.observed = float(state["target"]), float(state["gain"]), state["observed"]
