"""The training loop: :func:`fit` trains a :class:`Learner`, whatever it is, in one process or several.

A learner brings the module, batches as a pure function of the step, and a loss. As batches depend on nothing but the
step, and draws on nothing but the step and the part of its batch, a run that resumes from a checkpoint repeats exactly
what an uninterrupted one would have done, also in other processes. Each process computes on its part of a step's batch
(``parts.py``); gradients are averaged by torch's DistributedDataParallel.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from madtp.errors import ConfigError, TrainingError
from madtp.processes import current
from madtp.pruned import PrunedModel
from madtp.training.checkpoint import checkpoint_name, last_checkpoint, read_checkpoint, write_checkpoint
from madtp.training.config import TrainingConfig
from madtp.training.feed import prefetch
from madtp.training.kernels import for_gradients, without_gradients
from madtp.training.optim import learning_rate_at, make_optimisers, set_learning_rate
from madtp.training.parts import Batch, Metrics, Parts
from madtp.training.precision import precision_on
from madtp.training.progress import Progress
from madtp.training.tensorboard import TensorBoard


@dataclass
class Learner:
    """What is trained, on what, by which loss.

    Attributes:
        module: holds every trained parameter; may hold more than the model (auxiliary heads, say).
        batch: (step from 0, rows) -> tensors of the samples at these places, 0 to ``samples_per_step - 1``, of the step's
            batch, on the CPU; a pure function of both. Tensors without dimensions are numbers by which the loss divides a
            sum (of the words in captions, say): they become their mean over all parts of the batch.
        loss: (module, batch, step) -> scalar loss and metrics to show. Runs under the autocast of the config. The loss is a
            mean over samples, or divides by what the batch brings for that; it must change no state, as a step may have several
            parts. Metrics with a slash in their name go to TensorBoard only.
        evaluate: module in eval mode -> metrics on held-out data; None where there is none. Called in every process, and has
            to return the same in all.
        before_step: called with the number of the step, from 0, and the module before anything is computed, e.g. to set the
            pruning strength.
        on_step: called after each optimiser step with the number of steps done, the module and the step's metrics, means over
            all parts, e.g. to steer the pruning gain. State that it keeps must live in the module's buffers or in `state`.
        state: JSON-able values of the learner's own that checkpoints carry along (updated in place on resume).
        card: JSON-able facts about the run as configured now, for the recipe's model card; not in checkpoints.
        samples_per_step: size of a step's batch over all processes.
        sample_name: plural noun for it.
        padding: tensors of a batch that are padded in their last dimension, and with what: all parts are padded to the longest.
    """

    module: nn.Module
    batch: Callable[[int, range], Batch]
    loss: Callable[[nn.Module, Batch, int], tuple[Tensor, Metrics]]
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    before_step: Callable[[int, nn.Module], None] | None = None
    on_step: Callable[[int, nn.Module, Metrics], None] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    samples_per_step: int = 1
    sample_name: str = "samples"
    padding: Mapping[str, float] = field(default_factory=dict)


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

    In a group of processes (:func:`madtp.processes.joined`) each takes its part of every batch; the first one writes.

    Args:
        learner: see :class:`Learner`.
        config: see :class:`TrainingConfig`.
        folder: checkpoints go to its subfolder `checkpoints`; all processes read it.
        resume: go on from the folder's last checkpoint; without one, start from the beginning.
        device: torch device for module and batches.
        progress: where numbers are shown; None shows them on the terminal.
        stop_after: stop, with a checkpoint, once this many steps are done in all.

    Raises:
        ConfigError: the batch of a step cannot be divided over processes and micro batches, or something that the config asks
            for is not there.
        TrainingError: the loss is not finite, or the folder holds checkpoints and `resume` is off.
        CheckpointError: the checkpoint to resume from is unusable.
    """
    processes = current()
    parts = Parts(learner.samples_per_step, processes, config.accumulate, config.seed)
    checkpoints = folder / "checkpoints"
    found = last_checkpoint(checkpoints)
    if len(set(processes.gather(found and found.name))) > 1:
        raise TrainingError(
            f"not all processes see the same checkpoints in {checkpoints}; choose a folder that they share"
        )
    if found and not resume:
        raise TrainingError(f"{checkpoints} holds checkpoints of an earlier run; resume it or choose another folder")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    module = learner.module.to(device)
    if config.gradient_checkpointing:
        _checkpoint_pruned(module)
    optimisers = make_optimisers(module, config)
    start = 0
    if found:
        start, extra = read_checkpoint(found, module, optimisers)
        learner.state.update(extra)
    stop = min(config.steps, stop_after or config.steps)
    board = progress if progress and processes.main else Progress(quiet=not processes.main)
    writer = TensorBoard(folder, start) if config.tensorboard and processes.main else None
    loop = _Loop(learner, config, checkpoints, parts, optimisers, board, writer, torch.device(device), found)
    began = time.perf_counter()
    try:
        with board.running(start, config.steps, learner.samples_per_step, learner.sample_name):
            loop.run(start, stop)
    finally:
        if writer:
            writer.close()
    assert loop.saved is not None or start == stop
    return TrainingResult(stop, loop.metrics, loop.evaluation, time.perf_counter() - began, loop.saved or checkpoints)


def _checkpoint_pruned(module: nn.Module) -> None:
    found = [part for part in module.modules() if isinstance(part, PrunedModel)]
    if not found:
        raise ConfigError(
            "training.gradient_checkpointing is for pruned models, and this recipe trains none; use the model's own switch"
        )
    for part in found:
        part.gradient_checkpointing = True


class _Loss(nn.Module):
    """The learner's loss as a forward, which is what DistributedDataParallel watches."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.module = learner.module
        self.loss = learner.loss

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        return self.loss(self.module, batch, step)


def _parallel(loss: _Loss) -> DistributedDataParallel:
    # Newer versions of torch have another name for it.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # A step may leave parameters without gradient: an auxiliary head, say, or a tower that this phase does not train.
    # Buffers stay equal without help: they depend on weights and on what was gathered from all processes.
    options: dict[str, Any] = {"find_unused_parameters": True, buffers: False}
    return DistributedDataParallel(loss, **options)


@dataclass
class _Loop:
    learner: Learner
    config: TrainingConfig
    checkpoints: Path
    parts: Parts
    optimisers: list[torch.optim.Optimizer]
    board: Progress
    writer: TensorBoard | None
    device: torch.device
    saved: Path | None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.module = self.learner.module
        loss = _Loss(self.learner)
        self.loss: nn.Module = _parallel(loss) if self.parts.processes.size > 1 else loss

    def run(self, start: int, stop: int) -> None:
        config, writes = self.config, self.parts.processes.main
        self.module.train()
        for step, batches in enumerate(prefetch(self._batches, start, stop), start):
            metrics = self._step(step, [{name: x.to(self.device) for name, x in one.items()} for one in batches])
            done = step + 1
            last = done == stop
            if self.learner.on_step:
                self.learner.on_step(done, self.module, metrics)
            if _due(done, config.log_every) or last:
                self.metrics = {name: float(value) for name, value in metrics.items()}
                for board in self._boards():
                    board.show(done, self.metrics)
            if self.learner.evaluate and (_due(done, config.evaluate_every) or done == config.steps):
                self._evaluate(done)
            if _due(done, config.checkpoint_every) or last:
                self.saved = self.checkpoints / checkpoint_name(done)
                if writes:
                    state, keep = self.learner.state, config.keep_checkpoints
                    write_checkpoint(self.checkpoints, done, self.module, self.optimisers, state, keep)

    def _batches(self, step: int) -> list[Batch]:
        return [self.learner.batch(step, rows) for _, rows in self.parts.own()]

    def _step(self, step: int, batches: list[Batch]) -> dict[str, float | Tensor]:
        rate = learning_rate_at(step, self.config)
        set_learning_rate(self.optimisers, rate / self.config.learning_rate)
        self.module.zero_grad(set_to_none=True)
        self.parts.reseed(step)
        if self.learner.before_step:
            self.learner.before_step(step, self.module)
        alike = self.parts.alike(batches, self.learner.padding)
        found: list[Metrics] = []
        for (part, _), batch in zip(self.parts.own(), alike, strict=True):
            self.parts.reseed(step, part)
            with self._apart(len(found) + 1 < len(alike)):
                found.append(self._backward(step, batch))
        metrics = self.parts.mean(found, self.device)
        self._check(step, rate, float(metrics["loss"]))
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        return {**metrics, "lr": rate}

    def _backward(self, step: int, batch: Batch) -> dict[str, float | Tensor]:
        """Add a part's gradients; its metrics."""
        with for_gradients(self.device, self._low):
            with self._autocast():
                loss, metrics = self.loss(batch, step)
            (loss / self.config.accumulate).backward()
        return {"loss": loss.detach(), **metrics}

    def _apart(self, more: bool) -> AbstractContextManager[Any]:
        """Around a part after which ``more`` follow: gradients are averaged over processes with those of the last one."""
        return self.loss.no_sync() if more and isinstance(self.loss, DistributedDataParallel) else nullcontext()

    def _check(self, step: int, rate: float, loss: float) -> None:
        if loss - loss == 0:  # neither infinite nor NaN
            return
        where = f"resume from {self.saved}" if self.saved else "there is no checkpoint yet; start again"
        raise TrainingError(
            f"the loss of step {step} is {loss} at learning rate {rate:.2e}; {where} with a lower "
            "learning rate, a longer warm-up or precision float32"
        )

    def _evaluate(self, done: int) -> None:
        assert self.learner.evaluate is not None
        self.parts.reseed(done)
        with without_gradients(), self._autocast():
            self.module.eval()
            self.evaluation = self.learner.evaluate(self.module)
            self.module.train()
        for board in self._boards():
            board.show_evaluation(done, self.evaluation)

    def _boards(self) -> list[Progress | TensorBoard]:
        return [self.board] if self.writer is None else [self.board, self.writer]

    @property
    def _low(self) -> bool:
        return precision_on(self.device, self.config.precision) == "bfloat16"

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._low else nullcontext()


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
