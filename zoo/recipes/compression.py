"""Compression by any objective: :func:`compression_learner` makes the learner, :func:`finish_compression` writes the result.

The dense model is rewritten, its alignment tokens are taught (:func:`madtp.teach`), and it is fine-tuned with pruning active
while the strength is steered to the asked reduction (``madtp/training/compression.py``). At the end it is calibrated on
held-out samples.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

import madtp
import zoo
from madtp.atomic_files import remove_drafts, write_text
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.training.batch_shares import Batch
from madtp.training.compression import Steering, pruning_metrics, set_reached_strength, teach_in_all_processes
from madtp.training.config import TrainingConfig
from madtp.training.engine import Learner
from madtp.tuning.calibration import CalibrationResult
from zoo.objectives.base import AnyObjective, Metrics
from zoo.recipes.compression_settings import CompressionSettings
from zoo.tasks.fingerprints import fingerprint_checkpoint

TEACHING = "teaching"
_TEACHING_BATCH = 16
# How far calibration may miss the asked reduction in any case, and times the number of samples.
_TOLERANCE, _RESOLVED = 0.01, 0.5

ObjectiveT = TypeVar("ObjectiveT", bound=AnyObjective)
SettingsT = TypeVar("SettingsT", bound=CompressionSettings)


@dataclass(frozen=True)
class SampleSource:
    """Where the samples of a run come from.

    Attributes:
        batch: Takes a step and rows; returns the samples at these places of the step's batch. A pure function.
        samples_per_step: Size of the whole batch.
        sample_name: Plural noun for samples.
        held_out: Makes batches for evaluation during training; none for no evaluation.
        scores: Takes outputs on these and the batches; returns metrics.
        padding: See :class:`madtp.training.engine.Learner`.
        fingerprint: What the samples are, in JSON values, for runs that resume. Empty where they follow from the settings.
    """

    batch: Callable[[int, range], Batch]
    samples_per_step: int
    sample_name: str
    held_out: Callable[[], list[Batch]]
    scores: Callable[[Sequence[Any], Sequence[Batch]], dict[str, float]]
    padding: Mapping[str, float]
    fingerprint: Mapping[str, object] = field(default_factory=dict)


@dataclass(kw_only=True)
class CompressionLearner(Learner, Generic[ObjectiveT, SettingsT]):
    """The learner of a compression, with what its result is made of.

    Attributes:
        objective: What is learned.
        pruned: The rewritten module of the objective.
        settings: Settings of the recipe.
    """

    objective: ObjectiveT
    pruned: PrunedModel
    settings: SettingsT


def compression_learner(
    objective: ObjectiveT, source: SampleSource, settings: SettingsT, training: TrainingConfig
) -> CompressionLearner[ObjectiveT, SettingsT]:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    teacher = _teacher(objective) if settings.distillation else None
    example = source.batch(0, range(min(4, source.samples_per_step)))
    # A wrapper that was just made is in training mode, its model is not: no later call would be of that kind.
    module = objective.module.eval()
    pruned = madtp.rewrite(module, objective.inputs(example), config=settings.config(training.seed))
    objective.attach(pruned)
    state: dict[str, object] = {}
    steering = Steering(pruned, settings.budget, training.steps, state)

    def before_step(step: int, module: nn.Module) -> None:
        steering.before_step(step)
        if settings.teaches_at(step):
            device = next(pruned.parameters()).device

            def calls() -> Iterator[dict[str, Tensor]]:
                for inputs in _teaching_inputs(objective, source, settings.teaching_samples, step):
                    yield {name: value.to(device) for name, value in inputs.items()}

            with torch.autocast(device.type, enabled=False):
                taught = teach_in_all_processes(
                    pruned, calls, objective=objective.certainty, steps=settings.teaching_steps
                )
            state.setdefault(TEACHING, asdict(taught))

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        return compression_loss(
            objective, pruned, batch, teacher=teacher, settings=settings, progress=step / training.steps
        )

    held_out: list[Batch] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        if not held_out:
            held_out.extend(source.held_out())
        outputs, saved = [], 0.0
        for batch in held_out:
            outputs.append(pruned(**objective.inputs(batch)))
            kept, dense = objective.macs(pruned)
            saved += (1 - kept / dense) / len(held_out)
        return {**source.scores(outputs, held_out), "reduction": saved}

    return CompressionLearner(
        module=nn.ModuleDict({"pruned": pruned, "heads": objective.heads}),
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
        depends_on={
            "settings": asdict(settings),
            "data": source.fingerprint,
            "weights": fingerprint_checkpoint(settings.model, settings.checkpoint),
        },
        objective=objective,
        pruned=pruned,
        settings=settings,
    )


def _teacher(objective: AnyObjective) -> nn.Module:
    """Return a frozen copy of what is trained, as it is before training."""
    return copy.deepcopy(objective.module).eval().requires_grad_(False)


def _teaching_inputs(
    objective: AnyObjective, source: SampleSource, samples: int, step: int
) -> Iterator[dict[str, Tensor]]:
    """Yield inputs to teach on: the samples that training sees from ``step`` on."""
    for number in range(0, samples, _TEACHING_BATCH):
        later, first = divmod(number, source.samples_per_step)
        last = min(first + _TEACHING_BATCH, source.samples_per_step)
        yield objective.inputs(source.batch(step + later, range(first, last)))


def compression_loss(
    objective: AnyObjective,
    pruned: PrunedModel,
    batch: Batch,
    *,
    teacher: nn.Module | None,
    settings: CompressionSettings,
    progress: float,
) -> tuple[Tensor, Metrics]:
    """Return the loss of a batch, a scalar, and metrics, among them those that steering needs.

    The loss is that of the task, the alignment loss and the distance to the teacher.

    Args:
        objective: What is learned.
        pruned: The rewritten module that learns it.
        batch: A batch of the objective.
        teacher: The dense module that is followed; None for no distillation.
        settings: Weights of the losses.
        progress: Fraction of the run that is done, 0 to 1.
    """
    output: object = pruned(**objective.inputs(batch))
    # An objective may call the model again; this is the call whose MACs and alignment count.
    measured = pruning_metrics(pruned, objective.macs(pruned))
    alignment = pruned.madtp.alignment_loss() if settings.alignment_weight and _aligns(pruned) else None
    distance = None if teacher is None else objective.distillation(pruned, teacher, batch, output)
    total, metrics = objective.losses(pruned, batch, output, progress)
    metrics = metrics | measured
    if alignment is not None:
        total = total + settings.alignment_weight * alignment
        metrics["align"] = alignment.detach()
    if distance is not None:
        total = total + settings.distillation * distance
        metrics["distil"] = distance.detach()
    return total, metrics


def _aligns(pruned: PrunedModel) -> bool:
    """Return whether guidance prunes both towers, so that there is something to align."""
    return pruned.madtp.config.alignment and len({site.modality for site in pruned.madtp.report.sites}) > 1


def finish_compression(
    learner: CompressionLearner[ObjectiveT, SettingsT],
    calls: Sequence[Mapping[str, Tensor]],
    test: Callable[[nn.Module], dict[str, object]],
    output: Path,
) -> None:
    """Calibrate, and write the folder ``pruned`` with ``card.json`` in it.

    Args:
        learner: The learner that was trained.
        calls: Arguments of the model on held-out samples, to calibrate on.
        test: Returns what the saved model, loaded again, scores; for the card.
        output: Folder of the run.
    """
    settings = learner.settings
    # Calibration starts from the strength that it finds, and ends a little elsewhere from another one.
    set_reached_strength(learner.pruned, learner.state)
    pruned = deploy(learner.objective, learner.pruned, calls[0])
    calibration = calibrate_closely(pruned, calls, settings.reduction)
    remove_drafts(output / "pruned")  # of a run that was killed here: the output is locked
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
    write_text(output / "pruned" / "card.json", json.dumps(card, indent=1, default=str) + "\n")


def deploy(objective: AnyObjective, pruned: PrunedModel, inputs: Mapping[str, object]) -> PrunedModel:
    """Return the trained model rewritten for calls with one text an image, with what was trained.

    Args:
        objective: Its model is rewritten.
        pruned: The trained module.
        inputs: Example arguments of the model.

    Raises:
        ConfigError: The two rewritten models have different sites.
    """
    if objective.module is objective.model:
        return pruned.eval()
    fresh = madtp.rewrite(objective.model.eval(), dict(inputs), config=pruned.madtp.config)
    trained = {
        name.replace("sites.model_", "sites.", 1): value
        for name, value in pruned.state_dict().items()
        if name.startswith("madtp.")
    }
    missing, unexpected = fresh.load_state_dict(trained, strict=False)
    if unexpected or any(name.startswith("madtp.") for name in missing):
        raise ConfigError(f"the sites of the trained and the deployed model differ: {unexpected[:3]}")
    fresh.madtp.gain, fresh.madtp.temperature = pruned.madtp.gain, pruned.madtp.temperature
    return fresh.eval()


def calibrate_closely(
    pruned: PrunedModel, calls: Sequence[Mapping[str, Tensor]], reduction: float
) -> CalibrationResult:
    """Calibrate (:func:`madtp.calibrate`), the nearer to ``reduction`` the more samples there are.

    Scores fall steeply with MACs, so models that are compared have to cost the same.
    """
    samples = sum(len(next(iter(call.values()))) for call in calls)
    return madtp.calibrate(pruned, calls, reduction=reduction, tolerance=min(_TOLERANCE, _RESOLVED / samples))
