"""The search behind :func:`madtp.calibrate`: one setting of a pruned model, moved until the MACs are right.

Start at :class:`Search`. It brackets the target on a logarithmic scale and shrinks the bracket; every evaluation runs all
batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.errors import CalibrationError
from madtp.pruned import PrunedModel
from madtp.sites.additions import PREFIX

Steer = Literal["gain", "temperature", "keep_ratio"]
EVALUATIONS = 25
FEWEST_BATCHES = 4
RESOLUTION = 1e-6  # of the logarithm of the knob: below it a step of the reduction is a jump


@dataclass(frozen=True)
class Measurement:
    """One evaluation: the knob's value, MACs per sample at it, and the reduction that this is."""

    value: float
    macs: float
    reduction: float


def mac_reduction(pruned: PrunedModel) -> float:
    """Fraction of the dense MACs that the last forward saved; negative where pruning cost more than it saved."""
    return 1.0 - pruned.macs() / dense_macs(pruned)


def dense_macs(pruned: PrunedModel) -> float:
    """MACs per sample that the last forward would have taken without pruning; nothing is run."""
    return float(sum(pruned.macs_by_module("all").values()))


@dataclass(frozen=True)
class Knob:
    """A setting on a scale of *strength* s, more of which prunes more: value = exp(sign * s), s in [low, high].

    weakest: the value at the weak end of the scale.
    """

    name: Steer
    read: Callable[[PrunedModel], float]
    write: Callable[[PrunedModel, float], None]
    low: float
    high: float
    sign: int
    weakest: float

    def value(self, strength: float) -> float:
        return self.weakest if strength <= self.low else math.exp(self.sign * strength)

    def strength(self, value: float) -> float:
        if value <= 0.0:
            return 0.0
        return min(max(self.sign * math.log(value), self.low), self.high)


def _read_keep_ratio(pruned: PrunedModel) -> float:
    ratio = pruned.config.keep_ratio
    return 1.0 if ratio is None else ratio


def _write_keep_ratio(pruned: PrunedModel, value: float) -> None:
    pruned.config = replace(pruned.config, keep_ratio=value)
    pruned._control.config = pruned.config


KNOBS = {
    "gain": Knob("gain", lambda p: p.gain, lambda p, v: setattr(p, "gain", v), -12.0, 12.0, 1, 0.0),
    "temperature": Knob(
        "temperature", lambda p: p.temperature, lambda p, v: setattr(p, "temperature", v), -9.0, 12.0, 1, math.exp(-9.0)
    ),
    "keep_ratio": Knob("keep_ratio", _read_keep_ratio, _write_keep_ratio, 0.0, 9.0, -1, 1.0),
}


class Search:
    """Bracketing, then shrinking the bracket, of one knob."""

    def __init__(self, pruned: PrunedModel, calls: list[Call], knob: Knob, target: float, tolerance: float) -> None:
        self.pruned, self.calls, self.knob = pruned, calls, knob
        self.target, self.tolerance = target, tolerance
        self.sizes = [next(t.shape[0] for t in call.tensors() if t.dim()) for call in calls]
        self.samples = sum(self.sizes)
        self.dense = 0.0
        self.dense_of: list[float] = []
        self.macs_of: list[float] = []
        self.history: list[Measurement] = []

    def run(self) -> Measurement:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as self.progress:
            self.task = self.progress.add_task(f"calibrating {self.knob.name}", total=EVALUATIONS * len(self.calls))
            self._narrow(*self._bracket())
            best = min(self.history, key=self._miss)
            if self.history[-1] is not best:
                best = self._measure(best.value)
        if self._miss(best) > self.tolerance:
            raise CalibrationError(self._jump())
        return best

    def deviation(self) -> float | None:
        """Standard error of the last evaluation's reduction, from how far the batches differ."""
        if len(self.calls) < FEWEST_BATCHES:
            return None
        mean = sum(self.macs_of) / sum(self.dense_of)
        residuals = [macs - mean * dense for macs, dense in zip(self.macs_of, self.dense_of, strict=True)]
        n = len(residuals)
        return math.sqrt(sum(r * r for r in residuals) * n / (n - 1)) / sum(self.dense_of)

    def _miss(self, measured: Measurement) -> float:
        return abs(measured.reduction - self.target)

    def _near(self, measured: Measurement) -> bool:
        return self._miss(measured) <= self.tolerance / 4

    def _bracket(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Two strengths with their reductions, one on each side of the target (or one twice, where it is met)."""
        knob, step = self.knob, 0.2
        at = knob.strength(knob.read(self.pruned))
        reached = self._at(at)
        up = reached < self.target
        while True:
            if self._near(self.history[-1]):
                return (at, reached), (at, reached)
            if at == (knob.high if up else knob.low):
                raise CalibrationError(self._unreachable(reached, up))
            ahead = min(at + step, knob.high) if up else max(at - step, knob.low)
            there = self._at(ahead)
            if (there < self.target) != up:
                ends = (at, reached), (ahead, there)
                return ends if up else (ends[1], ends[0])
            at, reached, step = ahead, there, step * 2.5

    def _narrow(self, weak: tuple[float, float], strong: tuple[float, float]) -> None:
        """Regula falsi with a bisection after every step that kept the same end."""
        kept: str | None = None
        while len(self.history) < EVALUATIONS - 1 and not self._near(self.history[-1]):
            width = strong[0] - weak[0]
            if width < RESOLUTION or strong[1] <= weak[1]:
                return
            share = (self.target - weak[1]) / (strong[1] - weak[1])
            share = 0.5 if kept is not None else min(max(share, 0.1), 0.9)
            middle = weak[0] + width * share
            reached = self._at(middle)
            if reached < self.target:
                weak, end = (middle, reached), "strong"
            else:
                strong, end = (middle, reached), "weak"
            kept = end if kept is None else None

    def _at(self, strength: float) -> float:
        return self._measure(self.knob.value(strength)).reduction

    def _measure(self, value: float) -> Measurement:
        """Run all batches at a value of the knob."""
        self.knob.write(self.pruned, value)
        self.macs_of = []
        for number, (call, size) in enumerate(zip(self.calls, self.sizes, strict=True)):
            output = self.pruned(*call.args, **call.kwargs)
            if any(has_nan(x) for x in pytree.tree_leaves(output)):
                raise CalibrationError(
                    f"the model's output on batch {number} holds NaN at {self.knob.name} {value:.4g}; check the inputs and "
                    "the weights."
                )
            self.macs_of.append(size * self.pruned.macs())
            if len(self.dense_of) <= number:
                self.dense_of.append(size * dense_macs(self.pruned))
            self.progress.advance(self.task)
        self.dense, macs = sum(self.dense_of) / self.samples, sum(self.macs_of) / self.samples
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
        fixed = sum(self.pruned.macs_by_module("none").values()) / total
        overhead = sum(v for k, v in self.pruned.macs_by_module().items() if k.startswith(f"{PREFIX}.")) / total
        config = self.pruned.config
        kept = max(0.0, 1.0 - reached - fixed - overhead)
        limit = "temperature" if name == "temperature" else f"min_tokens={config.min_tokens}"
        helps = ["a larger gain"] if name == "temperature" else []
        helps += ["a smaller min_tokens"] if config.min_tokens and name != "temperature" else []
        helps += ["fewer alignment tokens"] if config.alignment else []
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
