"""Accuracy, compute, tokens and time of each model on the same batches. Start at :func:`measure`."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from madtp.demo.models import Contender
from madtp.pictures.page import Measurement

if TYPE_CHECKING:
    from zoo.scenes import Batch

TIMING_ROUNDS = 9
FEWEST_ROUNDS = 3
TIMING_SECONDS = 20.0  # on a busy machine, timing stops early rather than make a user wait


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The model's arguments in a batch, which also holds the labels."""
    return {
        "images": batch["images"],
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
    }


def measure(
    contenders: Sequence[Contender], batches: Sequence[Batch], advance: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Measure every contender on every batch, the first contender being the dense reference.

    `advance` is called :func:`steps` times, for a progress bar. Time is measured on one batch, models in turn so that
    a disturbance hits all alike: the median of at most 9 rounds after one that is thrown away, in ms per sample.
    """
    results = [_evaluate(contender, batches, advance) for contender in contenders]
    dense_macs = _dense_macs(next(c.model for c in contenders if c.pruned), batches, advance)
    times = _interleaved_times([c.model for c in contenders], batches[len(batches) // 2], advance)
    return [
        Measurement(
            model=contender.name,
            accuracy=result.accuracy,
            macs=dense_macs if result.macs is None else result.macs,
            reduction=0.0 if result.macs is None else 1 - result.macs / dense_macs,
            image_tokens=result.tokens["image"],
            text_tokens=result.tokens["text"],
            milliseconds=milliseconds,
        )
        for contender, result, milliseconds in zip(contenders, results, times, strict=True)
    ]


def steps(contenders: int, batches: int) -> int:
    """How often :func:`measure` calls `advance`."""
    return (contenders + 1) * batches + TIMING_ROUNDS + 1


@dataclass(frozen=True)
class _Result:
    """Accuracy in [0, 1]; MACs per sample (None: the dense model's); mean tokens after each layer, by modality."""

    accuracy: float
    macs: float | None
    tokens: dict[str, tuple[float, ...]]


@torch.inference_mode()
def _evaluate(contender: Contender, batches: Sequence[Batch], advance: Callable[[], None]) -> _Result:
    model: Any = contender.model
    right = total = 0
    macs = 0.0
    counts: dict[str, dict[str, list[Tensor]]] = {"image": defaultdict(list), "text": defaultdict(list)}
    for batch in batches:
        answers = model(**inputs_of(batch)).argmax(-1)
        right += int((answers == batch["labels"]).sum())
        total += len(answers)
        macs += model.macs() * len(answers) if contender.pruned else 0.0
        for modality, site, kept in _tokens(contender, batch):
            counts[modality][site].append(kept)
        advance()
    means = {
        modality: tuple(float(torch.cat(kept).float().mean()) for kept in sites.values())
        for modality, sites in counts.items()
    }
    return _Result(right / total, macs / total if contender.pruned else None, means)


@torch.inference_mode()
def _dense_macs(pruned: Any, batches: Sequence[Batch], advance: Callable[[], None]) -> float:
    """Mean MACs of a sample in the dense model, by the cost table of a pruned one, as that needs no further capture."""
    macs = 0.0
    total = 0
    for batch in batches:
        with pruned.dense():
            pruned(**inputs_of(batch))
            macs += pruned.macs() * len(batch["labels"])
        total += len(batch["labels"])
        advance()
    return macs / total


def _tokens(contender: Contender, batch: Batch) -> list[tuple[str, str, Tensor]]:
    """(modality, site, tokens of each sample after it) of the last forward, in the order of the layers."""
    model: Any = contender.model
    if contender.pruned:
        kept = model.token_counts()
        return [(site.modality, site.name, kept[site.name]) for site in model.report.sites]
    vision, text = model.config.vision, model.config.text
    valid = batch["attention_mask"].sum(1)
    images = torch.full((len(valid),), vision.tokens)
    return [("image", f"layer {i}", images) for i in range(vision.depth)] + [
        ("text", f"layer {i}", valid) for i in range(text.depth)
    ]


@torch.inference_mode()
def _interleaved_times(models: Sequence[nn.Module], batch: Batch, advance: Callable[[], None]) -> list[float]:
    """Median milliseconds per sample of each model, the models taking turns."""
    inputs = inputs_of(batch)
    samples = len(batch["labels"])
    seconds: list[list[float]] = [[] for _ in models]
    begin = time.perf_counter()
    for turn in range(TIMING_ROUNDS + 1):
        advance()
        if turn > FEWEST_ROUNDS and time.perf_counter() - begin > TIMING_SECONDS:
            continue
        for model, taken in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(**inputs)
            if turn > 0:
                taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken) / samples for taken in seconds]
