"""The search behind :func:`madtp.calibrate`: it moves one setting of a pruned model until the MACs are right.

Start at :class:`Search`. It brackets the target on a logarithmic scale and shrinks the bracket. Every evaluation runs all
batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.errors import CalibrationError
from madtp.pruned import PrunedModel
from madtp.sites.additions import PREFIX
from madtp.tuning.token_tally import TokenTally

KnobName = Literal["gain", "temperature", "keep_ratio"]
EVALUATIONS = 25
"""Most evaluations of a search."""
FEWEST_BATCHES = 4
"""Fewest batches from which a standard error is estimated."""
RESOLUTION = 1e-6
"""Of the knob's logarithm: where a bracket is narrower, the reduction jumps inside it."""


@dataclass(frozen=True)
class Measurement:
    """One evaluation of a setting.

    Attributes:
        value: the value of the knob.
        macs: multiply-accumulates per sample at it.
        reduction: fraction of the dense MACs that it saves.
    """

    value: float
    macs: float
    reduction: float


def mac_reduction(pruned: PrunedModel) -> float:
    """Return the fraction of the dense MACs that the last forward of ``pruned`` saved; negative if pruning cost more."""
    return 1.0 - pruned.madtp.macs() / dense_macs(pruned)


def dense_macs(pruned: PrunedModel) -> float:
    """Return the MACs per sample that the last forward of ``pruned`` would have taken without pruning. Nothing is run."""
    return float(sum(pruned.madtp.macs_by_module("all").values()))


@dataclass(frozen=True)
class Knob:
    """A setting on a scale of *strength* s, where more strength prunes more: value = exp(sign * s), s in [low, high].

    Attributes:
        name: the name of the setting.
        read: gets its value from a model.
        write: sets its value in a model.
        low: weak end of the scale.
        high: strong end of the scale.
        sign: 1 if a larger value prunes more, -1 if it prunes less.
        weakest: the value at the weak end, in place of exp(sign * low).
    """

    name: KnobName
    read: Callable[[PrunedModel], float]
    write: Callable[[PrunedModel, float], None]
    low: float
    high: float
    sign: int
    weakest: float

    def value(self, strength: float) -> float:
        """The value of the setting at a strength."""
        return self.weakest if strength <= self.low else math.exp(self.sign * strength)

    def strength(self, value: float) -> float:
        """The strength of a value, brought into the scale."""
        if value <= 0.0:
            return 0.0
        return min(max(self.sign * math.log(value), self.low), self.high)


def _read_keep_ratio(pruned: PrunedModel) -> float:
    ratio = pruned.madtp.config.keep_ratio
    return 1.0 if ratio is None else ratio


def _write_keep_ratio(pruned: PrunedModel, value: float) -> None:
    pruned.madtp.config = replace(pruned.madtp.config, keep_ratio=value)


KNOBS = {
    "gain": Knob(
        name="gain",
        read=lambda pruned: pruned.madtp.gain,
        write=lambda pruned, value: setattr(pruned.madtp, "gain", value),
        low=-12.0,
        high=12.0,
        sign=1,
        weakest=0.0,
    ),
    "temperature": Knob(
        name="temperature",
        read=lambda pruned: pruned.madtp.temperature,
        write=lambda pruned, value: setattr(pruned.madtp, "temperature", value),
        low=-9.0,
        high=12.0,
        sign=1,
        weakest=math.exp(-9.0),
    ),
    "keep_ratio": Knob(
        name="keep_ratio",
        read=_read_keep_ratio,
        write=_write_keep_ratio,
        low=0.0,
        high=9.0,
        sign=-1,
        weakest=1.0,
    ),
}


class _Point(NamedTuple):
    """A strength of the knob, and the reduction at it."""

    strength: float
    reduction: float


class _Bracket(NamedTuple):
    """Two points, one on each side of the target; the same one twice if it meets the target."""

    weak: _Point
    strong: _Point


class Search:
    """The search for the value of one knob at which the reduction meets a target.

    Attributes:
        pruned: the model, whose setting it changes.
        calls: the batches.
        knob: the setting.
        target: the reduction to reach.
        tolerance: how far the reduction may be off.
        sizes: samples in each batch.
        samples: samples in all batches.
        dense: MACs per sample without pruning.
        tokens: what the sites kept in the last evaluation.
        history: every evaluation, in order.
    """

    def __init__(self, pruned: PrunedModel, calls: list[Call], knob: Knob, *, target: float, tolerance: float) -> None:
        self.pruned, self.calls, self.knob = pruned, calls, knob
        self.target, self.tolerance = target, tolerance
        self.sizes = [next(t.shape[0] for t in call.tensors() if t.dim()) for call in calls]
        self.samples = sum(self.sizes)
        self.dense = 0.0
        self._dense_by_batch: list[float] = []
        self._macs_by_batch: list[float] = []
        self.tokens = TokenTally()
        self.history: list[Measurement] = []

    def run(self) -> Measurement:
        """Search; the model is left at the best value.

        Raises:
            CalibrationError: the target cannot be reached, or an output is NaN.
        """
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as self.progress:
            self.task = self.progress.add_task(f"calibrating {self.knob.name}", total=EVALUATIONS * len(self.calls))
            self._narrow(self._bracket())
            best = min(self.history, key=self._miss)
            if self.history[-1] is not best:
                best = self._measure(best.value)
        if self._miss(best) > self.tolerance:
            raise CalibrationError(self._jump())
        return best

    def deviation(self) -> float | None:
        """Standard error of the last evaluation's reduction, from how far the batches differ; None if they are too few."""
        if len(self.calls) < FEWEST_BATCHES:
            return None
        mean = sum(self._macs_by_batch) / sum(self._dense_by_batch)
        residuals = [macs - mean * dense for macs, dense in zip(self._macs_by_batch, self._dense_by_batch, strict=True)]
        n = len(residuals)
        return math.sqrt(sum(r * r for r in residuals) * n / (n - 1)) / sum(self._dense_by_batch)

    def _miss(self, measured: Measurement) -> float:
        return abs(measured.reduction - self.target)

    def _near(self, measured: Measurement) -> bool:
        return self._miss(measured) <= self.tolerance / 4

    def _bracket(self) -> _Bracket:
        """Go from the present value in steps that grow, until the target is passed."""
        knob, step = self.knob, 0.2
        point = self._evaluate(knob.strength(knob.read(self.pruned)))
        up = point.reduction < self.target
        while True:
            if self._near(self.history[-1]):
                return _Bracket(point, point)
            if point.strength == (knob.high if up else knob.low):
                raise CalibrationError(self._unreachable(point.reduction, up))
            ahead = min(point.strength + step, knob.high) if up else max(point.strength - step, knob.low)
            following = self._evaluate(ahead)
            if (following.reduction < self.target) != up:
                return _Bracket(point, following) if up else _Bracket(following, point)
            point, step = following, step * 2.5

    def _narrow(self, bracket: _Bracket) -> None:
        """Shrink a bracket, by regula falsi and bisection in turn."""
        weak, strong = bracket
        bisect = False
        while len(self.history) < EVALUATIONS - 1 and not self._near(self.history[-1]):
            width = strong.strength - weak.strength
            if width < RESOLUTION or strong.reduction <= weak.reduction:
                return
            share = (self.target - weak.reduction) / (strong.reduction - weak.reduction)
            share = 0.5 if bisect else min(max(share, 0.1), 0.9)
            middle = self._evaluate(weak.strength + width * share)
            if middle.reduction < self.target:
                weak = middle
            else:
                strong = middle
            bisect = not bisect

    def _evaluate(self, strength: float) -> _Point:
        return _Point(strength, self._measure(self.knob.value(strength)).reduction)

    def _measure(self, value: float) -> Measurement:
        """Run all batches at a value of the knob."""
        self.knob.write(self.pruned, value)
        self._macs_by_batch, self.tokens = [], TokenTally()
        for number, (call, size) in enumerate(zip(self.calls, self.sizes, strict=True)):
            output = self.pruned(*call.args, **call.kwargs)
            if any(has_nan(x) for x in pytree.tree_leaves(output)):
                raise CalibrationError(
                    f"the model's output on batch {number} holds NaN at {self.knob.name} {value:.4g}; check the inputs and "
                    "the weights."
                )
            self._macs_by_batch.append(size * self.pruned.madtp.macs())
            self.tokens.add(self.pruned)
            if len(self._dense_by_batch) <= number:
                self._dense_by_batch.append(size * dense_macs(self.pruned))
            self.progress.advance(self.task)
        self.dense, macs = sum(self._dense_by_batch) / self.samples, sum(self._macs_by_batch) / self.samples
        result = Measurement(value, macs, 1.0 - macs / self.dense)
        self.history.append(result)
        return result

    def _unreachable(self, reached: float, up: bool) -> str:
        name, value = self.knob.name, self.knob.value(self.knob.high if up else self.knob.low)
        if not up:
            return (
                f"a reduction of {self.target:.1%} cannot be reached: even at {name} {value:.3g} it is {reached:.1%}, the "
                f"least that {name} gives here. Ask for more, or steer another setting."
            )
        most = max(m.reduction for m in self.history)
        total = dense_macs(self.pruned)
        fixed = sum(self.pruned.madtp.macs_by_module("none").values()) / total
        overhead = sum(v for k, v in self.pruned.madtp.macs_by_module().items() if k.startswith(f"{PREFIX}.")) / total
        config = self.pruned.madtp.config
        kept = max(0.0, 1.0 - reached - fixed - overhead)
        limit = "temperature" if name == "temperature" else f"min_tokens={config.min_tokens}"
        helps = ["a larger gain"] if name == "temperature" else []
        helps += ["a smaller min_tokens"] if config.min_tokens and name != "temperature" else []
        helps += ["fewer alignment tokens"] if self.pruned.madtp.control.guided else []
        helps += ["pruning all towers"] if config.towers is not None else []
        return (
            f"a reduction of {self.target:.1%} cannot be reached: the most is {most:.1%}, at {name} {value:.3g}. Of the dense "
            f"MACs, {fixed:.1%} are spent before the first pruning or outside the pruned streams, {overhead:.1%} on choosing "
            f"tokens (alignment tokens), and {kept:.1%} on tokens that survive there ({limit}, protected and merged ones). "
            f"What would help: {', '.join([*helps, 'larger inputs'])}."
        )

    def _jump(self) -> str:
        below = max((m for m in self.history if m.reduction < self.target), key=lambda m: m.reduction)
        above = min((m for m in self.history if m.reduction >= self.target), key=lambda m: m.reduction)
        return (
            f"a reduction of {self.target:.1%} within {self.tolerance:.2%} cannot be reached on these {self.samples} samples: "
            f"between {self.knob.name} {below.value:.7g} and {above.value:.7g} it jumps from {below.reduction:.2%} to "
            f"{above.reduction:.2%}, as tokens go one by one. Give more samples or a larger tolerance."
        )


def has_nan(value: object) -> bool:
    """Whether a value is a tensor that holds NaN."""
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())
