"""Compression of any subject: :func:`compression_learner` makes the learner, :func:`finish_compression` writes what it is for.

The dense model is rewritten, its alignment tokens are taught (`madtp.teach`), and it is fine-tuned with pruning active while
its strength is steered to the asked reduction (madtp/training/compression.py). At the end it is calibrated on held-out samples.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import madtp
import zoo
from madtp.pruned import PrunedModel
from madtp.training.batch_shares import Batch
from madtp.training.compression import Steering, teach_in_all_processes
from madtp.training.config import TrainingConfig
from madtp.training.engine import Learner
from madtp.tuning.calibration import CalibrationResult
from zoo.objectives.base import CompressionSettings, Metrics, Subject, compression_loss, deploy

TEACHING = "teaching"
_TAUGHT_AT_ONCE = 16
# How far calibration may miss the asked reduction in any case, and times the number of samples.
_TOLERANCE, _RESOLVED = 0.01, 0.5


@dataclass(frozen=True)
class Source:
    """Where batches come from.

    Attributes:
        batch: (step, rows) -> the samples at these places of the batch of a step; pure.
        samples_per_step: size of the whole batch.
        sample_name: plural noun for samples.
        held_out: makes batches for evaluation during training; none for no evaluation.
        scores: outputs on them and they themselves -> metrics.
        padding: see :class:`madtp.training.engine.Learner`.
    """

    batch: Callable[[int, range], Batch]
    samples_per_step: int
    sample_name: str
    held_out: Callable[[], list[Batch]]
    scores: Callable[[Sequence[Any], Sequence[Batch]], dict[str, float]]
    padding: Mapping[str, float]


class Pupil(nn.Module):
    """The pruned module of a subject, and its heads."""

    def __init__(self, subject: Subject, pruned: PrunedModel) -> None:
        super().__init__()
        self.pruned = pruned
        self.heads = subject.heads


def compression_learner(
    subject: Subject, source: Source, settings: CompressionSettings, training: TrainingConfig
) -> Learner:
    """Return the learner that :func:`madtp.training.engine.fit` trains; `learner.module` is a :class:`Pupil`."""
    dense = _dense(subject) if settings.distillation else None
    example = source.batch(0, range(min(4, source.samples_per_step)))
    pruned = madtp.rewrite(subject.module, subject.inputs(example), config=settings.config(training.seed))
    subject.attach(pruned)
    pupil = Pupil(subject, pruned)
    state: dict[str, Any] = {}
    steering = Steering(pruned, settings.budget, training.steps, state)

    def before_step(step: int, module: nn.Module) -> None:
        steering.before_step(step)
        if settings.teaches_at(step):
            batches = _lesson_plan(subject, source, settings.teaching_samples, step, pruned)
            device = next(pruned.parameters()).device.type
            with torch.autocast(device, enabled=False):
                taught = teach_in_all_processes(
                    pruned, batches, objective=subject.certainty, steps=settings.teaching_steps
                )
            state.setdefault(TEACHING, asdict(taught))

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        return compression_loss(subject, pruned, dense, batch, settings, step / training.steps)

    held_out: list[Batch] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        if not held_out:
            held_out.extend(source.held_out())
        outputs, saved = [], 0.0
        for group in held_out:
            outputs.append(pruned(**subject.inputs(group)))
            kept, whole = subject.macs(pruned)
            saved += (1 - kept / whole) / len(held_out)
        return {**source.scores(outputs, held_out), "reduction": saved}

    return Learner(
        module=pupil,
        batch=source.batch,
        loss=loss,
        evaluate=evaluate,
        before_step=before_step,
        on_step=lambda done, module, metrics: steering.on_step(metrics),
        state=state,
        samples_per_step=source.samples_per_step,
        sample_name=source.sample_name,
        padding=source.padding,
        card={"settings": asdict(settings), "training": training.to_dict()},
    )


def _dense(subject: Subject) -> nn.Module:
    """A frozen copy of what the subject is before it is trained."""
    return copy.deepcopy(subject.module).eval().requires_grad_(False)


def _lesson_plan(
    subject: Subject, source: Source, samples: int, step: int, pruned: PrunedModel
) -> Callable[[], Iterator[dict[str, Tensor]]]:
    """Makes inputs to teach on: the samples that training sees from `step` on."""
    device = next(pruned.parameters()).device

    def batches() -> Iterator[dict[str, Tensor]]:
        for number in range(0, samples, _TAUGHT_AT_ONCE):
            later, first = divmod(number, source.samples_per_step)
            last = min(first + _TAUGHT_AT_ONCE, source.samples_per_step)
            inputs = subject.inputs(source.batch(step + later, range(first, last)))
            yield {name: value.to(device) for name, value in inputs.items()}

    return batches


def calibrate_closely(pruned: PrunedModel, calls: Sequence[Mapping[str, Any]], reduction: float) -> CalibrationResult:
    """:func:`madtp.calibrate`, the nearer to `reduction` the more samples there are: scores fall steeply with MACs."""
    samples = sum(len(next(iter(call.values()))) for call in calls)
    return madtp.calibrate(pruned, calls, reduction=reduction, tolerance=min(_TOLERANCE, _RESOLVED / samples))


def finish_compression(
    subject: Subject,
    learner: Learner,
    settings: CompressionSettings,
    calls: Sequence[Mapping[str, Any]],
    test: Callable[[nn.Module], dict[str, Any]],
    output: Path,
) -> None:
    """Calibrate, write the folder `pruned` and, in it, `card.json`.

    Args:
        subject: that was trained.
        learner: that trained it.
        settings: of the recipe.
        calls: arguments of the model on held-out samples, to calibrate on.
        test: what the saved model, loaded again, scores; for the card.
        output: folder.
    """
    pruned = deploy(subject, cast(Pupil, learner.module).pruned, calls[0])
    calibration = calibrate_closely(pruned, calls, settings.reduction)
    madtp.save(pruned, output / "pruned", dtype=torch.float16)
    shipped = madtp.load(output / "pruned", zoo.create(settings.model)).eval()
    card = {
        "model": settings.model,
        **learner.card,
        **({TEACHING: learner.state[TEACHING]} if TEACHING in learner.state else {}),
        "calibration": {
            "gain": calibration.gain,
            "temperature": calibration.temperature,
            "reduction": calibration.reduction_reached,
            "dense_macs": calibration.dense_macs,
            "macs": calibration.macs,
        },
        "test": test(shipped),
    }
    (output / "pruned" / "card.json").write_text(json.dumps(card, indent=1, default=str) + "\n")
