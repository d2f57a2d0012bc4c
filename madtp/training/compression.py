"""Fine-tune a pruned model to a compute budget: :class:`Steering`, :func:`pruning_metrics`, :func:`distillation_loss`.

The target grows along a cosine from ``start_reduction`` to ``reduction`` over the first ``ramp`` of the run. After each step
:class:`madtp.tuning.calibration.GainController` moves the pruning strength a little towards it, by the MACs that the step
actually took. Nothing is assumed about the cost of the dense model, or about how much a given strength saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from madtp.processes import current
from madtp.pruned import PrunedModel
from madtp.training.batch_shares import Metrics
from madtp.training.number_ranges import PART, SHARE, Range, check_numbers
from madtp.tuning.calibration import GainController
from madtp.tuning.search import KNOBS
from madtp.tuning.teaching import SaliencyObjective, TeachingResult, teach

FIRST_KEEP_RATIO = 0.85
"""Keep ratio, at gain 1, of a control with a fixed ratio: close to the start of the ramp."""

REDUCTION = "reduction"
"""Name of the metric that steers the next step."""

BUDGET_RANGES: Mapping[str, Range] = {
    "reduction": PART,
    "start_reduction": PART,
    "ramp": SHARE,
    "rate": Range(0, 10, above=True),
}
"""What the numbers of :class:`Budget` may be."""

_STATE = "controller"


@dataclass(frozen=True)
class Budget:
    """How far to prune, and how fast to get there.

    Attributes:
        reduction: fraction of the dense MACs to save at the end.
        start_reduction: target at the first step.
        ramp: fraction of the run over which the target grows.
        rate: step size of the controller; see :class:`~madtp.tuning.calibration.GainController`.
    """

    reduction: float
    start_reduction: float = 0.3
    ramp: float = 0.4
    rate: float = 0.03

    def __post_init__(self) -> None:
        check_numbers(self, BUDGET_RANGES, "settings")

    def target(self, progress: float) -> float:
        """Return the reduction to aim at after ``progress`` (0 to 1) of the run."""
        risen = 1.0 if progress >= self.ramp else 0.5 * (1 - math.cos(math.pi * progress / self.ramp))
        return self.start_reduction + (self.reduction - self.start_reduction) * risen


class Steering:
    """Sets the pruning strength before each step, and adjusts it by the MACs of the step.

    Args:
        pruned: the model that is trained.
        budget: the reduction to reach.
        steps: steps of the whole run.
        state: state of the learner. The controller stores its own there, so that checkpoints hold it.
    """

    def __init__(self, pruned: PrunedModel, budget: Budget, steps: int, state: dict[str, Any]) -> None:
        self.pruned, self.budget, self.steps, self.state = pruned, budget, steps, state
        self.controller = GainController(budget.start_reduction, gain=pruned.madtp.config.gain, rate=budget.rate)
        state[_STATE] = self.controller.state_dict()

    def before_step(self, step: int) -> None:
        """Set the pruning strength of a step; steps count from 0."""
        self.controller.load_state_dict(self.state[_STATE])
        self.controller.target = self.budget.target(step / self.steps)
        set_pruning_strength(self.pruned, self.controller.gain)

    def on_step(self, metrics: Metrics) -> None:
        """Adjust the strength by the ``reduction`` among a step's metrics.

        It is a mean over all shares of the batch, so all processes steer alike.
        """
        self.controller.step(float(metrics[REDUCTION]))
        self.state[_STATE] = self.controller.state_dict()


def set_reached_strength(pruned: PrunedModel, state: Mapping[str, Any]) -> None:
    """Set the strength that steering has reached, also in a process that resumed behind the last step.

    Args:
        pruned: the model that was trained.
        state: state of the learner.
    """
    set_pruning_strength(pruned, state[_STATE]["gain"])


def set_pruning_strength(pruned: PrunedModel, gain: float) -> None:
    """Set the gain, or, for a control with a fixed keep ratio, a ratio that falls as the gain rises."""
    if pruned.madtp.config.keep_ratio is None:
        pruned.madtp.gain = gain
    else:
        KNOBS["keep_ratio"].write(pruned, min(1.0, FIRST_KEEP_RATIO / gain))


def pruning_metrics(pruned: PrunedModel, macs: tuple[float, float] | None = None) -> dict[str, float | Tensor]:
    """Return metrics of the last forward.

    Args:
        pruned: a model that has run.
        macs: multiply-accumulates of a sample, pruned and dense; ``None`` takes those that the model reports.

    Returns:
        ``reduction`` and ``gain`` (or ``keep_ratio``); and, for TensorBoard alone, ``pruning/temperature``,
        ``pruning/macs`` and, as ``tokens/SITE``, the mean number of tokens that a site keeps.
    """
    kept, dense = macs or (pruned.madtp.macs(), sum(pruned.madtp.macs_by_module("all").values()))
    tokens = {f"tokens/{site}": counts.float().mean() for site, counts in pruned.madtp.token_counts().items()}
    config = pruned.madtp.config
    gain = pruned.madtp.gain if config.keep_ratio is None else config.keep_ratio
    return {
        REDUCTION: 1 - kept / dense,
        "gain" if config.keep_ratio is None else "keep_ratio": gain,
        "pruning/temperature": pruned.madtp.temperature,
        "pruning/macs": kept,
        **tokens,
    }


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence from the teacher's answers, as a mean over samples.

    Args:
        logits: answers of the student, the pruned model: ``[M, classes]``.
        teacher_logits: answers of the teacher, the dense model, without gradient: ``[M, classes]``.
    """
    student, teacher = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def teach_in_all_processes(
    pruned: PrunedModel,
    batches: Callable[[], Iterable[Mapping[str, Any] | tuple[Any, ...]]],
    *,
    steps: int,
    objective: SaliencyObjective | None = None,
) -> TeachingResult:
    """Run :func:`madtp.teach` in the main process, and copy what it learned to the others.

    Args:
        pruned: the model, equal in all processes.
        batches: makes the inputs to teach on.
        steps: number of steps.
        objective: scalar of the model's outputs, as :func:`madtp.teach` takes it.
    """
    processes = current()
    taught = teach(pruned, batches(), objective=objective, steps=steps) if processes.main else None
    result = processes.from_main(taught)
    assert result is not None
    processes.spread(pruned.parameters())
    return result
