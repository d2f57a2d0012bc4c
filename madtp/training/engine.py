"""The training loop: :func:`fit` trains any :class:`Learner`, in one process or several.

A learner brings the module, batches as a pure function of the step, and a loss. Batches depend on the step alone, and random
draws on the step and the share of its batch. So a run that resumes from a checkpoint repeats exactly what an uninterrupted
one would have done, also in another number of processes. Each process computes on its shares of a step's batch
(``batch_shares.py``); torch's DistributedDataParallel averages the gradients.
"""

from __future__ import annotations

import inspect
import math
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
from madtp.processes import Processes, current, usable_device
from madtp.pruned import PrunedModel
from madtp.saving.output_lock import claimed
from madtp.training.attention_kernels import inference_kernels, training_kernels
from madtp.training.batch_shares import Batch, BatchShares, Metrics
from madtp.training.checkpoint import Trained, checkpoint_name, checkpoints, not_finite, write_checkpoint
from madtp.training.config import TrainingConfig
from madtp.training.optim import learning_rate_at, make_optimisers, set_learning_rate
from madtp.training.precision import precision_on
from madtp.training.prefetch import prefetch
from madtp.training.progress import Progress
from madtp.training.resuming import RESUME_ANYWAY, SHARES, as_json, check_config, newest_whole
from madtp.training.tensorboard import TensorBoard

LOCK = ".lock"


@dataclass
class Learner:
    """What is trained, on what, by which loss.

    Attributes:
        module: holds every trained parameter. It may hold more than the model, such as auxiliary heads.
        batch: maps ``(step, rows)`` to the tensors of these samples, on the CPU. Steps count from 0; rows are positions in
            the step's batch, 0 to ``samples_per_step - 1``. Must be a pure function. A tensor without dimensions is a number
            by which the loss divides a sum (over the words of captions, for instance); it becomes its mean over all shares
            of the batch.
        loss: maps ``(module, batch, step)`` to a scalar loss and metrics. Runs under the autocast of the config. The loss is
            a mean over samples, or divides by a number that the batch brings. It must not change any state, because a step
            may have several shares. Metrics with a slash in their name go to TensorBoard only.
        evaluate: maps the module, in eval mode, to metrics on held-out data; ``None`` where there is none. Called in every
            process, and must return the same in all.
        before_step: called before anything is computed, with the number of the step, from 0, and the module; sets the pruning
            strength, for instance.
        on_step: called after each optimiser step with the number of steps done, the module, and the metrics of the step as
            means over all shares; steers the pruning gain, for instance. State that it keeps must live in the module's
            buffers or in ``state``.
        state: JSON values of the learner that checkpoints store; updated in place on resume.
        card: JSON facts about the run as configured now, for the recipe's model card; not in checkpoints.
        depends_on: JSON values that the result depends on besides the engine's config, such as the settings of a recipe and
            fingerprints of its data. Checkpoints store them, and a run that resumes must have the same.
        samples_per_step: size of a step's batch over all processes.
        sample_name: plural noun for the samples.
        padding: names of the tensors of a batch that are padded in their last dimension, to the longest of all shares, and
            the value to pad with.
    """

    module: nn.Module
    batch: Callable[[int, range], Batch]
    loss: Callable[[nn.Module, Batch, int], tuple[Tensor, Metrics]]
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    before_step: Callable[[int, nn.Module], None] | None = None
    on_step: Callable[[int, nn.Module, Metrics], None] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    samples_per_step: int = 1
    sample_name: str = "samples"
    padding: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended.

    Attributes:
        steps: number of steps done.
        metrics: last training metrics.
        evaluation: last metrics on held-out data.
        seconds: duration of this call.
        checkpoint: folder of the last checkpoint.
    """

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
    resume_anyway: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> TrainingResult:
    """Train to ``config.steps``, with checkpoints in a folder.

    In a group of processes (:func:`madtp.processes.joined`), each takes its shares of every batch, and the first one writes.

    Args:
        learner: see :class:`Learner`.
        config: see :class:`TrainingConfig`.
        folder: checkpoints go to its subfolder ``checkpoints``; all processes read it.
        resume: continue from the last checkpoint of the folder; without one, start from the beginning. Where the last one is
            damaged, a warning says so, and the one before is taken.
        resume_anyway: continue also with another config than the checkpoint was written with. The result is then that of
            neither. Settings that change no result, such as ``log_every``, may differ in any case.
        device: torch device for module and batches.
        progress: where numbers are shown; ``None`` shows them on the terminal.
        stop_after: total number of steps after which to stop, with a checkpoint.

    Raises:
        ConfigError: if the batch of a step cannot be divided over processes and micro batches, or if the config or ``device``
            asks for something that is not available.
        TrainingError: if the loss, gradients or weights are not finite, or if the folder holds checkpoints and ``resume`` is
            off. The last checkpoint is good in any case.
        CheckpointError: if no checkpoint to resume from is usable, or the last one belongs to another config.
        OutputInUseError: if another run writes to the folder.
    """
    processes, usable = current(), usable_device(device)
    shares = BatchShares(learner.samples_per_step, processes, config.accumulate, config.seed)
    place = folder / "checkpoints"
    with claimed(place, place / LOCK, processes):
        _check_folder(place, processes, resume=resume or resume_anyway)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        module = learner.module.to(usable)
        if config.gradient_checkpointing:
            _checkpoint_pruned(module)
        trained = Trained(module, make_optimisers(module, config))
        unset = frozenset(not_finite(trained.tensors()))
        depends_on = as_json({**learner.depends_on, "training": config.to_dict(), SHARES: shares.count})
        stored = newest_whole(place, unset)
        if stored:
            check_config(stored, depends_on, config.steps, anyway=resume_anyway)
            stored.load_into(trained)
            learner.state.update(stored.extra)
        start = stored.step if stored else 0
        stop = max(start, min(config.steps, stop_after or config.steps))
        writer = TensorBoard(folder, start) if config.tensorboard and processes.main else None
        loop = _Loop(
            learner=learner,
            config=config,
            depends_on=depends_on,
            checkpoints=place,
            shares=shares,
            trained=trained,
            unset=unset,
            board=progress if progress and processes.main else Progress(quiet=not processes.main),
            writer=writer,
            device=usable,
            saved=stored.path if stored else None,
        )
        return loop.train(start, stop)


def _check_folder(place: Path, processes: Processes, *, resume: bool) -> None:
    """Make sure that all processes see the same checkpoints, and that none is there unless it may be resumed."""
    found = [path.name for path in checkpoints(place)]
    if any(names != found for names in processes.gather(found)):
        raise TrainingError(f"not all processes see the same checkpoints in {place}; choose a folder that they share")
    if found and not resume:
        raise TrainingError(f"{place} holds checkpoints of an earlier run; resume it or choose another folder")


def _checkpoint_pruned(module: nn.Module) -> None:
    found = [part for part in module.modules() if isinstance(part, PrunedModel)]
    if not found:
        raise ConfigError(
            "training.gradient_checkpointing is for pruned models, and this recipe trains none; use the model's own switch"
        )
    for part in found:
        part.madtp.gradient_checkpointing = True


class _Loss(nn.Module):
    """The learner's loss as a module, since DistributedDataParallel wraps a forward."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.module = learner.module
        self.loss = learner.loss

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        return self.loss(self.module, batch, step)


def _parallel(loss: _Loss) -> DistributedDataParallel:
    # Newer versions of torch have renamed the argument.
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # A step may leave parameters without gradient: those of an auxiliary head, or of a tower that this phase does not train.
    # Buffers need no synchronisation: they depend on weights and on what was gathered from all processes.
    parallel: Callable[..., DistributedDataParallel] = DistributedDataParallel
    return parallel(loss, find_unused_parameters=True, **{sync_buffers: False})


@dataclass
class _Loop:
    learner: Learner
    config: TrainingConfig
    depends_on: Mapping[str, object]
    checkpoints: Path
    shares: BatchShares
    trained: Trained
    unset: frozenset[str]
    board: Progress
    writer: TensorBoard | None
    device: torch.device
    saved: Path | None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.module = self.learner.module
        loss = _Loss(self.learner)
        self.loss: nn.Module = _parallel(loss) if self.shares.processes.size > 1 else loss

    def train(self, start: int, stop: int) -> TrainingResult:
        began = time.perf_counter()
        try:
            with self.board.running(start, self.config.steps, self.learner.samples_per_step, self.learner.sample_name):
                self.run(start, stop)
        finally:
            if self.writer:
                self.writer.close()
        seconds = time.perf_counter() - began
        return TrainingResult(stop, self.metrics, self.evaluation, seconds, self.saved or self.checkpoints)

    def run(self, start: int, stop: int) -> None:
        config, writes = self.config, self.shares.processes.main
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
                self._check_weights(done)
                if writes:
                    write_checkpoint(
                        self.checkpoints,
                        done,
                        self.trained,
                        extra=self.learner.state,
                        config=self.depends_on,
                        keep=config.keep_checkpoints,
                    )
                self.saved = self.checkpoints / checkpoint_name(done)

    def _batches(self, step: int) -> list[Batch]:
        return [self.learner.batch(step, share.rows) for share in self.shares.local()]

    def _step(self, step: int, batches: list[Batch]) -> dict[str, float | Tensor]:
        rate = learning_rate_at(step, self.config)
        set_learning_rate(self.trained.optimisers, rate / self.config.learning_rate)
        self.module.zero_grad(set_to_none=True)
        self.shares.reseed(step)
        if self.learner.before_step:
            self.learner.before_step(step, self.module)
        equal = self.shares.equalise(batches, self.learner.padding)
        found: list[Metrics] = []
        for share, batch in zip(self.shares.local(), equal, strict=True):
            self.shares.reseed(step, share.number)
            with nullcontext() if len(found) + 1 == len(equal) else self._unsynchronised():
                found.append(self._backward(step, batch))
        metrics = self.shares.mean(found, self.device)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._check(step, rate, float(metrics["loss"]), float(norm))
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        for optimiser in self.trained.optimisers:
            optimiser.step()
        return {**metrics, "lr": rate}

    def _backward(self, step: int, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradients of a share; return its metrics."""
        with training_kernels(self.device, bfloat16=self._bfloat16):
            with self._autocast():
                loss, metrics = self.loss(batch, step)
            (loss / self.config.accumulate).backward()
        return {"loss": loss.detach(), **metrics}

    def _unsynchronised(self) -> AbstractContextManager[object]:
        """Context of every share but the last, with whose gradients those of all are averaged over processes."""
        return self.loss.no_sync() if isinstance(self.loss, DistributedDataParallel) else nullcontext()

    def _check(self, step: int, rate: float, loss: float, norm: float) -> None:
        """Stop before weights change by a loss or gradients that are not finite, which are the same in all processes."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        fault = f"the loss of step {step} is {loss:.3g}"
        if math.isfinite(loss):
            gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
            faults = not_finite(gradients)
            fault += f" and the norm of its gradients {norm}" + (f" ({faults[0]})" if faults else "")
        raise TrainingError(
            f"{fault} at learning rate {rate:.2e}; {self._way_on} a lower learning rate, a longer warm-up or precision float32"
        )

    def _check_weights(self, done: int) -> None:
        faults = [name for name in not_finite(self.trained.tensors()) if name not in self.unset]
        if faults:
            raise TrainingError(
                f"after step {done - 1}, {len(faults)} tensors hold NaN or infinite values ({faults[0]}), so no checkpoint is "
                f"written; {self._way_on} a lower learning rate or a longer warm-up"
            )

    @property
    def _way_on(self) -> str:
        if self.saved is None:
            return "there is no checkpoint yet, so start again with"
        return f"resume from {self.saved} by {RESUME_ANYWAY} with"

    def _evaluate(self, done: int) -> None:
        assert self.learner.evaluate is not None
        self.shares.reseed(done)
        with inference_kernels(), self._autocast():
            self.module.eval()
            self.evaluation = self.learner.evaluate(self.module)
            self.module.train()
        for board in self._boards():
            board.show_evaluation(done, self.evaluation)

    def _boards(self) -> list[Progress | TensorBoard]:
        return [self.board] if self.writer is None else [self.board, self.writer]

    @property
    def _bfloat16(self) -> bool:
        return precision_on(self.device, self.config.precision) == "bfloat16"

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._bfloat16 else nullcontext()


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
