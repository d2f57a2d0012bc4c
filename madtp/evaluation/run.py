"""Run a task over its samples, resume from stored results, and add up: :func:`evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from madtp.errors import ConfigError
from madtp.evaluation.batch_result import BatchResult
from madtp.evaluation.compute_meter import CallRecord, ComputeMeter
from madtp.evaluation.partial_results import PartialResults
from madtp.evaluation.task import Result, Stage, Task
from madtp.processes import ALONE, Processes


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        metrics: metrics of the task.
        samples: one entry for each sample: its ``id``, the result of each stage by name, and ``tokens`` as
            ``{stage: {site: count}}`` where a pruned model was called once for it.
        macs: mean multiply-accumulates of a sample; ``None`` for a model that is not pruned.
        dense_macs: the same with all tokens kept.
        seconds: duration of the calls of all stages, including those of an earlier, interrupted run.
    """

    metrics: dict[str, float]
    samples: tuple[dict[str, Any], ...]
    macs: float | None
    dense_macs: float | None
    seconds: float

    @property
    def reduction(self) -> float | None:
        """Fraction of the dense MACs that is saved."""
        return None if self.macs is None or not self.dense_macs else 1 - self.macs / self.dense_macs


def batches(task: Task, size: int) -> list[range]:
    """Return the positions of the samples, ``size`` at a time."""
    if size < 1:
        raise ConfigError(f"the batch size is {size}; it has to be at least 1.")
    count = len(task.ids)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    batch_size: int,
    partial_results: PartialResults | None = None,
    advance: Callable[[int], None] = lambda samples: None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Evaluate a model.

    Several processes take turns at the batches, which are those of a single process, and exchange their results after each
    stage. Every process returns the whole evaluation.

    Args:
        model: dense or pruned model; set to eval mode.
        task: what to evaluate.
        batch_size: number of samples of a batch.
        partial_results: where the results of every batch are stored, and read instead of computed if they are there;
            ``None`` stores nothing.
        advance: called after each batch of this process with its number of samples, once for each stage.
        processes: the processes that call this function together, with the same model and task.
    """
    model.eval()
    results: dict[str, list[Result]] = {}
    calls: list[CallRecord] = []
    ids = list(task.ids)
    samples: list[dict[str, Any]] = [{"id": name} for name in ids]
    seconds = 0.0
    for stage in task.stages:
        stage_results: list[Result] = []
        all_batches = batches(task, batch_size)
        local = []
        for batch in processes.share(all_batches):
            local.append(_run_or_read(model, stage, batch, ids=ids, earlier=results, partial_results=partial_results))
            advance(len(batch))
        by_rank = processes.gather(local)
        for number, batch in enumerate(all_batches):
            result = by_rank[number % processes.size][number // processes.size]
            _add_to_samples(samples, stage.name, batch, result)
            stage_results += result.results
            calls += result.calls
            seconds += result.seconds
        results[stage.name] = stage_results
    return Evaluation(
        metrics=task.metrics(results),
        samples=tuple(samples),
        macs=sum(call["macs"] for call in calls) / len(samples) if calls else None,
        dense_macs=sum(call["dense_macs"] for call in calls) / len(samples) if calls else None,
        seconds=seconds,
    )


def _run_or_read(
    model: nn.Module,
    stage: Stage,
    batch: range,
    *,
    ids: Sequence[str],
    earlier: Mapping[str, Sequence[Result]],
    partial_results: PartialResults | None,
) -> BatchResult:
    """The stored result of a stage for a batch, or else the computed one, which is then stored."""
    name = f"{stage.name}-{batch.start:08d}"
    stored = None if partial_results is None else partial_results.get(name)
    own_ids = [ids[place] for place in batch]
    if partial_results is not None and stored is not None:
        return BatchResult.from_json(stored, own_ids, partial_results.path(name))
    meter, start = ComputeMeter(), time.perf_counter()
    with torch.inference_mode(), meter.watching(model):
        results = stage.run(model, batch, earlier)
    result = BatchResult(own_ids, results, meter.calls, time.perf_counter() - start)
    if partial_results is not None:
        partial_results.put(name, result.to_json())
    return result


def _add_to_samples(samples: Sequence[dict[str, Any]], stage: str, batch: range, result: BatchResult) -> None:
    """Add the result of a batch to the entries of its samples."""
    whole_calls = [call for call in result.calls if call["samples"] == len(batch)]
    for number, position in enumerate(batch):
        samples[position][stage] = result.results[number]
        if whole_calls:
            tokens = {site: counts[number] for call in whole_calls for site, counts in call["tokens"].items()}
            samples[position].setdefault("tokens", {})[stage] = tokens
