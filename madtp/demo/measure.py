"""Accuracy, compute, tokens and time of each model on the same batches. Start at :func:`measure`."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from madtp.demo.models import Contender
from madtp.pictures.page import Measurement

if TYPE_CHECKING:
    from zoo.scenes import Batch

TIMING_ROUNDS = 9


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

    `advance` is called :func:`steps` times, for a progress bar. Time is measured on the first batch, models in turn so
    that a disturbance hits all alike: the median of 9 rounds after one that is thrown away, in ms per sample.
    """
    import madtp

    quality = [_evaluate(contender, batches, advance) for contender in contenders]
    macs = []
    for contender in contenders:
        macs.append(_mean([madtp.count_macs(contender.model, inputs_of(batch)) for batch in batches], batches))
        advance()
    times = _interleaved_times([c.model for c in contenders], batches[0], advance)
    return [
        Measurement(
            model=contender.name,
            accuracy=accuracy,
            macs=cost,
            reduction=1 - cost / macs[0],
            image_tokens=tokens["image"],
            text_tokens=tokens["text"],
            milliseconds=milliseconds,
        )
        for contender, (accuracy, tokens), cost, milliseconds in zip(contenders, quality, macs, times, strict=True)
    ]


def steps(contenders: int, batches: int) -> int:
    """How often :func:`measure` calls `advance`."""
    return contenders * batches + contenders + TIMING_ROUNDS + 1


@torch.inference_mode()
def _evaluate(
    contender: Contender, batches: Sequence[Batch], advance: Callable[[], None]
) -> tuple[float, dict[str, tuple[float, ...]]]:
    """Accuracy in [0, 1], and for each modality the mean tokens of a sample after each layer."""
    right = total = 0
    counts: dict[str, dict[str, list[Tensor]]] = {"image": defaultdict(list), "text": defaultdict(list)}
    for batch in batches:
        answers = contender.model(**inputs_of(batch)).argmax(-1)
        right += int((answers == batch["labels"]).sum())
        total += len(answers)
        for modality, site, kept in _tokens(contender, batch):
            counts[modality][site].append(kept)
        advance()
    means = {
        modality: tuple(float(torch.cat(kept).float().mean()) for kept in sites.values())
        for modality, sites in counts.items()
    }
    return right / total, means


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
    for turn in range(TIMING_ROUNDS + 1):
        for model, taken in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(**inputs)
            if turn > 0:
                taken.append(time.perf_counter() - start)
        advance()
    return [1000 * statistics.median(taken) / samples for taken in seconds]


def _mean(values: Sequence[float], batches: Sequence[Batch]) -> float:
    """Mean over samples of a value that is known per batch."""
    sizes = [len(batch["labels"]) for batch in batches]
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
