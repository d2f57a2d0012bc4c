"""Run a task over its samples, resume where parts are there, and add up: :func:`evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from madtp.errors import ConfigError
from madtp.evaluation.meter import Meter
from madtp.evaluation.parts import Parts
from madtp.evaluation.task import Result, Stage, Task
from madtp.processes import ALONE, Processes


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        metrics: of the task.
        samples: one entry a sample: `id`, the results of each stage by its name, and `tokens` {stage: {site: count}} where a
            pruned model was called once for it.
        macs, dense_macs: mean multiply-accumulates of a sample, as pruned, and with all tokens kept; None of a model that is
            not pruned.
        seconds: of the calls of all stages, also those of an earlier, interrupted run.
    """

    metrics: dict[str, float]
    samples: tuple[dict[str, Any], ...]
    macs: float | None
    dense_macs: float | None
    seconds: float

    @property
    def reduction(self) -> float | None:
        """Share of the dense MACs that is saved."""
        return None if self.macs is None or not self.dense_macs else 1 - self.macs / self.dense_macs


def batches(task: Task, size: int) -> list[range]:
    """Places of the samples, `size` at a time."""
    if size < 1:
        raise ConfigError(f"the batch size is {size}; it has to be at least 1.")
    count = len(task.ids)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    batch_size: int,
    parts: Parts | None = None,
    advance: Callable[[int], None] = lambda samples: None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Evaluate a model.

    Several processes take turns at the batches, which stay those of one process, and exchange what they found after each
    stage: every one returns the whole.

    Args:
        model: dense or pruned; set to eval mode.
        task: what to do.
        batch_size: samples at a time.
        parts: where results of every batch are kept, and those that are there already are taken from; None keeps none.
        advance: called after each batch of this process with its number of samples, once for each stage.
        processes: that call this function together, with the same model and task.
    """
    model.eval()
    results: dict[str, list[Result]] = {}
    calls: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = [{"id": name} for name in task.ids]
    seconds = 0.0
    for stage in task.stages:
        found: list[Result] = []
        every = batches(task, batch_size)
        own = [_part(model, stage, places, results, parts, advance) for places in processes.share(every)]
        shares = processes.gather(own)
        for number, places in enumerate(every):
            part = shares[number % processes.size][number // processes.size]
            _note(samples, stage.name, places, part)
            found += part["results"]
            calls += part["calls"]
            seconds += part["seconds"]
        results[stage.name] = found
    macs, dense = (
        sum(call[name] for call in calls) / len(samples) if calls else None for name in ("macs", "dense_macs")
    )
    return Evaluation(task.metrics(results), tuple(samples), macs, dense, seconds)


def _part(
    model: nn.Module,
    stage: Stage,
    places: range,
    earlier: Mapping[str, Sequence[Result]],
    parts: Parts | None,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """What a stage finds in a batch, from what is kept or by running it."""
    name = f"{stage.name}-{places.start:08d}"
    part = None if parts is None else parts.get(name)
    if part is None:
        meter, start = Meter(), time.perf_counter()
        with torch.inference_mode(), meter.watching(model):
            outcome = stage.run(model, places, earlier)
        part = {"results": outcome, "calls": meter.calls, "seconds": time.perf_counter() - start}
        if parts is not None:
            parts.put(name, part)
    advance(len(places))
    return part


def _note(samples: Sequence[dict[str, Any]], stage: str, places: range, part: dict[str, Any]) -> None:
    """Add a part to the entries of its samples."""
    own = [call for call in part["calls"] if call["samples"] == len(places)]
    for number, place in enumerate(places):
        samples[place][stage] = part["results"][number]
        if own:
            tokens = {site: counts[number] for call in own for site, counts in call["tokens"].items()}
            samples[place].setdefault("tokens", {})[stage] = tokens
