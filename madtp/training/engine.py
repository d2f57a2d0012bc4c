"""The training loop: :func:`fit` trains a :class:`Learner`, whatever it is.

A learner brings the module, batches as a pure function of the step, and a loss. As batches depend on nothing but the
step, a run that resumes from a checkpoint repeats exactly what an uninterrupted one would have done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from madtp.errors import TrainingError
from madtp.training.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
from madtp.training.config import TrainingConfig
from madtp.training.feed import prefetch
from madtp.training.optim import learning_rate_at, make_optimisers, set_learning_rate
from madtp.training.progress import Progress

Batch = Mapping[str, Tensor]
Metrics = Mapping[str, float | Tensor]


@dataclass
class Learner:
    """What is trained, on what, by which loss.

    Attributes:
        module: holds every trained parameter; may hold more than the model (auxiliary heads, say).
        batch: step (from 0) -> tensors of one training batch on the CPU; a pure function of the step.
        loss: (module, batch, step) -> scalar loss and metrics to show. Runs under the autocast of the config.
        evaluate: module in eval mode -> metrics on held-out data; None where there is none.
        on_step: called after each optimiser step with the number of steps done, the module and the step's metrics, e.g.
            to steer the pruning gain. State that it keeps must live in the module's buffers or in `state`.
        state: JSON-able values of the learner's own that checkpoints carry along (updated in place on resume).
        card: JSON-able facts about the run as configured now, for the recipe's model card; not in checkpoints.
        samples_per_step: what the shown rate counts.
        sample_name: plural noun for it.
    """

    module: nn.Module
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch, int], tuple[Tensor, Metrics]]
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    on_step: Callable[[int, nn.Module, Metrics], None] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    samples_per_step: int = 1
    sample_name: str = "samples"


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended: steps done, last training metrics, last evaluation, seconds of this call, checkpoint."""

    steps: int
    metrics: dict[str, float]
    evaluation: dict[str, float]
    seconds: float
    checkpoint: Path


def fit(
    learner: Learner,
    config: TrainingConfig,
    folder: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> TrainingResult:
    """Train to `config.steps`, with checkpoints in a folder.

    Args:
        learner: see :class:`Learner`.
        config: see :class:`TrainingConfig`.
        folder: checkpoints go to its subfolder `checkpoints`.
        resume: go on from the folder's last checkpoint; without one, start from the beginning.
        device: torch device for module and batches.
        progress: where numbers are shown; None shows them on the terminal.
        stop_after: stop, with a checkpoint, once this many steps are done in all.

    Raises:
        TrainingError: the loss is not finite, or the folder holds checkpoints and `resume` is off.
        CheckpointError: the checkpoint to resume from is unusable.
    """
    checkpoints = folder / "checkpoints"
    found = last_checkpoint(checkpoints)
    if found and not resume:
        raise TrainingError(f"{checkpoints} holds checkpoints of an earlier run; resume it or choose another folder")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    module = learner.module.to(device)
    optimisers = make_optimisers(module, config)
    start = 0
    if found:
        start, extra = read_checkpoint(found, module, optimisers)
        learner.state.update(extra)
    stop = min(config.steps, stop_after or config.steps)
    board = progress or Progress()
    loop = _Loop(learner, config, checkpoints, module, optimisers, board, device, found)
    began = time.perf_counter()
    with board.running(start, config.steps, learner.samples_per_step, learner.sample_name):
        loop.run(start, stop)
    assert loop.saved is not None or start == stop
    return TrainingResult(stop, loop.metrics, loop.evaluation, time.perf_counter() - began, loop.saved or checkpoints)


@dataclass
class _Loop:
    learner: Learner
    config: TrainingConfig
    checkpoints: Path
    module: nn.Module
    optimisers: list[torch.optim.Optimizer]
    board: Progress
    device: str
    saved: Path | None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)

    def run(self, start: int, stop: int) -> None:
        config = self.config
        self.module.train()
        for step, batch in enumerate(prefetch(self.learner.batch, start, stop), start):
            metrics = self._step(step, {name: value.to(self.device) for name, value in batch.items()})
            done = step + 1
            last = done == stop
            if self.learner.on_step:
                self.learner.on_step(done, self.module, metrics)
            if _due(done, config.log_every) or last:
                self.metrics = {name: float(value) for name, value in metrics.items()}
                self.board.show(done, self.metrics)
            if self.learner.evaluate and (_due(done, config.evaluate_every) or done == config.steps):
                self._evaluate(done)
            if _due(done, config.checkpoint_every) or last:
                self.saved = write_checkpoint(
                    self.checkpoints, done, self.module, self.optimisers, self.learner.state, config.keep_checkpoints
                )

    def _step(self, step: int, batch: Batch) -> dict[str, float | Tensor]:
        rate = learning_rate_at(step, self.config)
        set_learning_rate(self.optimisers, rate / self.config.learning_rate)
        self.module.zero_grad(set_to_none=True)
        with self._compute_context():
            loss, metrics = self.learner.loss(self.module, batch, step)
        if not torch.isfinite(loss):
            where = f"resume from {self.saved}" if self.saved else "there is no checkpoint yet; start again"
            raise TrainingError(
                f"the loss of step {step} is {loss.item()} at learning rate {rate:.2e}; {where} with a lower "
                "learning rate, a longer warm-up or precision float32"
            )
        loss.backward()
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        return {"loss": loss.detach(), **metrics, "lr": rate}

    def _evaluate(self, done: int) -> None:
        assert self.learner.evaluate is not None
        # Evaluation must not disturb the training's random numbers, or resuming would not repeat them.
        with torch.random.fork_rng(devices=[]), torch.no_grad(), self._compute_context():
            self.module.eval()
            self.evaluation = self.learner.evaluate(self.module)
            self.module.train()
        self.board.show_evaluation(done, self.evaluation)

    def _compute_context(self) -> ExitStack:
        contexts = ExitStack()
        device = torch.device(self.device).type
        if self.config.precision == "bfloat16":
            contexts.enter_context(torch.autocast(device, torch.bfloat16))
        if device == "cpu":
            # The backward of the fused CPU kernel takes six times as long as matmul and softmax on short sequences.
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        return contexts


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
