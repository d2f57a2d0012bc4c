"""What every recipe needs that fine-tunes a pruned model to a compute budget: :class:`Steering`, :func:`strength`.

The target grows along a cosine from `start_reduction` to `reduction` over the first `ramp` of the run; after each step the
pruning strength moves a little towards it (:class:`madtp.tuning.calibration.GainController`), by the MACs that the step really
took. Nothing is assumed about what the dense model costs or which strength gives which saving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from madtp.errors import ConfigError
from madtp.processes import current
from madtp.pruned import PrunedModel
from madtp.training.parts import Metrics
from madtp.tuning.calibration import GainController
from madtp.tuning.search import KNOBS
from madtp.tuning.teaching import TeachingResult, teach

FIRST_KEEP_RATIO = 0.85
"""Keep ratio of a control at gain 1: close to the start of the ramp."""

REDUCTION = "reduction"
"""Name of the metric that a step is steered by."""

_STATE = "controller"


@dataclass(frozen=True)
class Budget:
    """How far to prune, and how fast to get there.

    Attributes:
        reduction: fraction of the dense MACs to save in the end.
        start_reduction: target at the first step.
        ramp: part of the run over which the target grows, 0 to 1.
        rate: of the controller; see :class:`~madtp.tuning.calibration.GainController`.
    """

    reduction: float
    start_reduction: float = 0.3
    ramp: float = 0.4
    rate: float = 0.03

    def __post_init__(self) -> None:
        for name in ("reduction", "start_reduction"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"settings.{name} is {getattr(self, name)}; it takes a fraction between 0 and 1")
        if not 0 <= self.ramp <= 1 or not self.rate > 0:
            raise ConfigError(f"settings.ramp is {self.ramp} and rate {self.rate}; allowed: 0 to 1, and above 0")

    def target(self, part: float) -> float:
        """The reduction to aim at after `part` (0 to 1) of the run."""
        risen = 1.0 if part >= self.ramp else 0.5 * (1 - math.cos(math.pi * part / self.ramp))
        return self.start_reduction + (self.reduction - self.start_reduction) * risen


class Steering:
    """Sets the pruning strength before each step and learns from the step's MACs.

    Args:
        pruned: the model that is trained.
        budget: what to reach.
        steps: of the whole run.
        state: of the learner: what changes is kept there, so that checkpoints carry it.
    """

    def __init__(self, pruned: PrunedModel, budget: Budget, steps: int, state: dict[str, Any]) -> None:
        self.pruned, self.budget, self.steps, self.state = pruned, budget, steps, state
        self.controller = GainController(budget.start_reduction, gain=pruned.config.gain, rate=budget.rate)
        state[_STATE] = self.controller.state_dict()

    def before_step(self, step: int) -> None:
        """Set the strength of a step, from 0."""
        self.controller.load_state_dict(self.state[_STATE])
        self.controller.target = self.budget.target(step / self.steps)
        set_strength(self.pruned, self.controller.gain)

    def on_step(self, metrics: Metrics) -> None:
        """Take in the `reduction` of a step, the mean over all parts of its batch: all processes steer alike."""
        self.controller.step(float(metrics[REDUCTION]))
        self.state[_STATE] = self.controller.state_dict()


def set_strength(pruned: PrunedModel, gain: float) -> None:
    """Prune with ``gain``; a control with a fixed keep ratio gets a ratio that falls as the gain rises."""
    if pruned.config.keep_ratio is None:
        pruned.gain = gain
    else:
        KNOBS["keep_ratio"].write(pruned, min(1.0, FIRST_KEEP_RATIO / gain))


def strength(pruned: PrunedModel, macs: tuple[float, float] | None = None) -> dict[str, float | Tensor]:
    """Metrics of the last forward: `reduction` and `gain`, and for TensorBoard `pruning/temperature`, `pruning/macs` and
    `tokens/SITE`, the mean number of tokens kept.

    Args:
        pruned: has run.
        macs: multiply-accumulates a sample, pruned and dense; None takes those of the model.
    """
    kept, dense = macs or (pruned.macs(), sum(pruned.macs_by_module("all").values()))
    tokens = {f"tokens/{site}": counts.float().mean() for site, counts in pruned.token_counts().items()}
    config = pruned.config
    gain = pruned.gain if config.keep_ratio is None else config.keep_ratio
    return {
        REDUCTION: 1 - kept / dense,
        "gain" if config.keep_ratio is None else "keep_ratio": gain,
        "pruning/temperature": pruned.temperature,
        "pruning/macs": kept,
        **tokens,
    }


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Distillation: the mean over samples of the Kullback-Leibler divergence from the dense model's answers.

    Args:
        logits: ``[M, classes]`` of the pruned model.
        wanted: ``[M, classes]`` of the dense one, without gradient.
    """
    ours, theirs = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def teach_alike(
    pruned: PrunedModel, batches: Callable[[], Iterable[Mapping[str, Any] | tuple[Any, ...]]], **options: Any
) -> TeachingResult:
    """:func:`madtp.teach` in the main process; the others take over what it has learned.

    Args:
        pruned: equal in all processes.
        batches: makes the inputs to teach on.
        options: further arguments of :func:`madtp.teach`.
    """
    processes = current()
    result = processes.from_main(teach(pruned, batches(), **options) if processes.main else None)
    assert result is not None
    processes.spread(pruned.parameters())
    return result
