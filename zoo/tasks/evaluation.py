"""From settings to a result file: :func:`evaluate_settings`, which ``madtp eval`` calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import madtp
import zoo
from madtp.atomic_files import check_writable
from madtp.errors import CheckpointError, ConfigError
from madtp.evaluation import Evaluation, PartialResults, Task, evaluate
from madtp.evaluation.partial_results import write_json
from madtp.evaluation.run import batches
from madtp.processes import Processes, joined
from madtp.pruned import PrunedModel
from madtp.saving.output_lock import claimed
from madtp.training.number_ranges import PART, SEED, Range, check_numbers, whole
from madtp.tuning.search import KNOBS
from zoo.datasets.records import DataSet
from zoo.tasks.fingerprints import fingerprint_checkpoint, fingerprint_data, fingerprint_files
from zoo.tasks.registry import build_task
from zoo.transforms import for_model

RANGES: Mapping[str, Range] = {
    "limit": replace(whole(1), optional=True),
    "seed": SEED,
    "reduction": replace(PART, optional=True),
    "calibration_samples": whole(1),
    "batch_size": whole(1, 10**6),
}
"""What the numbers of :class:`EvaluationSettings` may be."""
STRENGTH = Range(0, 10**12)
"""What a stored pruning strength may be."""

PARTS, LOCK = ".parts", ".lock"
CALIBRATION = "calibration"


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated on what.

    Attributes:
        model: Name in the zoo.
        checkpoint: Name of shipped weights, a file, or a folder that :func:`madtp.save` wrote. None for random weights, drawn
            by ``seed``.
        data: See :func:`zoo.data`.
        root: See :func:`zoo.data`.
        split: See :func:`zoo.data`.
        annotations: See :func:`zoo.data`.
        limit: See :func:`zoo.data`.
        seed: See :func:`zoo.data`.
        reduction: Fraction of the dense MACs to save by calibration. None leaves the model as it is.
        calibration_split: Split to calibrate on.
        calibration_samples: Samples of that split to calibrate on, from its start.
        batch_size: Samples of a call.
        vocabulary: A BERT ``vocab.txt``, for models of full size.
        answers: A JSON list of answers to choose from, for models that answer questions. None lets them write answers.
        device: "cpu", "cuda" and so on.

    Raises:
        ConfigError: A number is out of its range.
    """

    model: str
    checkpoint: str | None = None
    data: str = "scenes"
    root: Path | None = None
    split: str = "test"
    annotations: Path | None = None
    limit: int | None = None
    seed: int = 0
    reduction: float | None = None
    calibration_split: str = "train"
    calibration_samples: int = 64
    batch_size: int = 32
    vocabulary: Path | None = None
    answers: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_numbers(self, RANGES)

    def to_dict(self) -> dict[str, object]:
        """Return the settings as JSON values."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}


def evaluate_settings(
    settings: EvaluationSettings,
    output: Path,
    *,
    per_sample: bool = False,
    begin: Callable[[int], None] = lambda samples: None,
    advance: Callable[[int], None] = lambda samples: None,
) -> dict[str, object]:
    """Evaluate and write ``output``, a JSON file; return its content.

    While the evaluation runs, results of finished batches are kept in a folder beside the file. If it is interrupted, the same
    evaluation goes on from there. Several processes, started by torchrun or accelerate, share the batches, and the first one
    writes.

    Args:
        settings: What to evaluate.
        output: File to write; it is replaced if it exists.
        per_sample: Also write the results of each sample: answers, and tokens kept at each site.
        begin: Called once with the number of samples that this process has, over all stages; for a progress bar.
        advance: Called with the number of samples that were done since the last call.

    Raises:
        ConfigError: ``output`` is a folder, or this machine does not have the device.
        UnwritableError: ``output`` cannot be written, or the disk is full. Batches that are done need not be repeated.
        CheckpointError: The folder of results belongs to another evaluation, or a file of it is damaged.
        OutputInUseError: Another evaluation writes ``output``.
    """
    if output.is_dir():
        raise ConfigError(f"{output} is a folder; name a file for the result.")
    check_writable(output)
    with (
        joined(settings.device) as (processes, device),
        claimed(output, output.with_name(output.name + LOCK), processes),
    ):
        return _evaluate(
            settings,
            output,
            per_sample=per_sample,
            begin=begin,
            advance=advance,
            processes=processes,
            device=torch.device(device),
        )


def _evaluate(
    settings: EvaluationSettings,
    output: Path,
    *,
    per_sample: bool,
    begin: Callable[[int], None],
    advance: Callable[[int], None],
    processes: Processes,
    device: torch.device,
) -> dict[str, object]:
    dense = zoo.create(settings.model)
    data = _data(settings, settings.split, limit=settings.limit, annotations=settings.annotations)
    task = _task(settings, dense, data, device)
    setup = {**settings.to_dict(), **_versions(), "files": _fingerprints(settings), "samples": fingerprint_data(data)}
    held_out = None
    if settings.reduction is not None:
        samples = settings.calibration_samples
        calibration_data = _data(settings, settings.calibration_split, limit=samples, annotations=None)
        held_out = _task(settings, dense, calibration_data, device)
        setup["calibrated_on"] = fingerprint_data(calibration_data)
    parts = PartialResults(output.with_name(output.name + PARTS), setup)
    processes.wait()  # a folder that another process begins to fill would not look like that of an evaluation
    model = _load(settings).to(device)
    if held_out is not None:
        model = _prune(settings, held_out, model, parts=parts, processes=processes)
    begin(len(task.stages) * sum(map(len, processes.share(batches(task, settings.batch_size)))))
    size = settings.batch_size
    found = evaluate(model, task, batch_size=size, partial_results=parts, advance=advance, processes=processes)
    content = _content(settings, task, model, found)
    if per_sample:
        content["per_sample"] = list(found.samples)
    if processes.main:
        write_json(output, content)
        parts.remove()
    return content


def _data(settings: EvaluationSettings, split: str, *, limit: int | None, annotations: Path | None) -> DataSet[Any]:
    return zoo.data(
        settings.data,
        settings.root,
        split,
        transform=for_model(settings.model),
        annotations=annotations,
        limit=limit,
        seed=settings.seed,
    )


def _task(settings: EvaluationSettings, model: nn.Module, data: DataSet[Any], device: torch.device) -> Task:
    return build_task(settings.model, model, data, device, vocabulary=settings.vocabulary, answers=settings.answers)


def _load(settings: EvaluationSettings) -> nn.Module:
    """Return the model with its weights, pruned if the weights are those of a pruned model."""
    if settings.checkpoint is None:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            return zoo.create(settings.model)
    return zoo.create(settings.model, settings.checkpoint)


def _prune(
    settings: EvaluationSettings,
    task: Task,
    model: nn.Module,
    *,
    parts: PartialResults,
    processes: Processes,
) -> PrunedModel:
    """Rewrite the model unless it is pruned, and calibrate it in one process.

    If the evaluation was interrupted, its results were made with a calibrated strength: the same one is set again.
    """
    first = task.inputs(batches(task, settings.batch_size)[0])
    pruned = model if isinstance(model, PrunedModel) else madtp.rewrite(model, first).eval()
    known = parts.get(CALIBRATION) if processes.main else None
    if processes.main and known is None:
        known = _calibrated(pruned, task, settings)
        parts.put(CALIBRATION, known)
    known = processes.from_main(known)
    assert known is not None
    steer: Any = known.get("steer")
    value: Any = known.get("value")
    if steer not in KNOBS or value not in STRENGTH:
        raise CheckpointError(
            f"{parts.path(CALIBRATION)} holds no pruning strength; remove {parts.folder} to evaluate all batches again."
        )
    KNOBS[steer].write(pruned, value)
    return pruned


def _calibrated(pruned: PrunedModel, task: Task, settings: EvaluationSettings) -> dict[str, object]:
    assert settings.reduction is not None
    calls = [task.inputs(places) for places in batches(task, settings.batch_size)]
    steer = madtp.calibrate(pruned, calls, reduction=settings.reduction).steer
    return {"steer": steer, "value": KNOBS[steer].read(pruned)}


def _fingerprints(settings: EvaluationSettings) -> dict[str, str]:
    """Return fingerprints of the files that were named: a path may hold another file when a run is resumed."""
    weights = fingerprint_checkpoint(settings.model, settings.checkpoint)
    return weights | fingerprint_files([settings.annotations, settings.vocabulary, settings.answers])


def _versions() -> dict[str, str]:
    return {"madtp_version": madtp.__version__, "torch_version": str(torch.__version__)}


def _content(settings: EvaluationSettings, task: Task, model: nn.Module, found: Evaluation) -> dict[str, object]:
    pruning = None
    if isinstance(model, PrunedModel):
        pruning = {**model.madtp.config.to_dict(), "gain": model.madtp.gain, "temperature": model.madtp.temperature}
    return {
        "task": task.name,
        "configuration": {**settings.to_dict(), **_versions(), "pruning": pruning},
        "samples": len(task.ids),
        "metrics": found.metrics,
        "compute": {
            "unit": 'multiply-accumulates per sample, which papers print as "FLOPs"',
            "macs": found.macs,
            "dense_macs": found.dense_macs,
            "reduction": found.reduction,
            "seconds": found.seconds,
        },
    }
