"""Accuracy, compute, tokens and time of each model on the same batches. Start at :func:`measure`."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from madtp.demo.models import DenseEntry, Entry, PrunedEntry
from madtp.pictures.page import Measurement
from madtp.pruned import PrunedModel

if TYPE_CHECKING:
    from zoo.scenes import Batch

TIMING_ROUNDS = 9
FEWEST_ROUNDS = 3
TIMING_SECONDS = 20.0  # on a busy machine, timing stops early rather than make a user wait


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """Return the arguments of the model in a batch, which also holds the labels."""
    return {
        "images": batch["images"],
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
    }


def measure(
    entries: Sequence[Entry], batches: Sequence[Batch], advance: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Measure every model on every batch.

    Time is measured on one batch. The models take turns, so that a disturbance affects all alike. It is the median, in
    milliseconds per sample, of at most 9 rounds after a discarded one.

    Args:
        entries: the models, at least one of them pruned.
        batches: held-out scenes.
        advance: called :func:`steps` times, for a progress bar.
    """
    results = [_evaluate(entry, batches, advance) for entry in entries]
    dense_macs = _dense_macs(next(e.model for e in entries if isinstance(e, PrunedEntry)), batches, advance)
    times = _interleaved_times([entry.model for entry in entries], batches[len(batches) // 2], advance)
    return [
        Measurement(
            model=entry.name,
            accuracy=result.accuracy,
            macs=dense_macs if result.macs is None else result.macs,
            reduction=0.0 if result.macs is None else 1 - result.macs / dense_macs,
            image_tokens=result.tokens["image"],
            text_tokens=result.tokens["text"],
            milliseconds=milliseconds,
        )
        for entry, result, milliseconds in zip(entries, results, times, strict=True)
    ]


def steps(models: int, batches: int) -> int:
    """Return how often :func:`measure` calls ``advance``."""
    return (models + 1) * batches + TIMING_ROUNDS + 1


@dataclass(frozen=True)
class _Result:
    """Result of one model.

    Attributes:
        accuracy: fraction of correct answers.
        macs: multiply-accumulates per sample; ``None`` for the dense model.
        tokens: mean number of tokens after each layer, by modality.
    """

    accuracy: float
    macs: float | None
    tokens: dict[str, tuple[float, ...]]


@torch.inference_mode()
def _evaluate(entry: Entry, batches: Sequence[Batch], advance: Callable[[], None]) -> _Result:
    correct = total = 0
    macs = 0.0
    counts: dict[str, dict[str, list[Tensor]]] = {"image": defaultdict(list), "text": defaultdict(list)}
    for batch in batches:
        answers: Tensor = entry.model(**inputs_of(batch)).argmax(-1)
        correct += int((answers == batch["labels"]).sum())
        total += len(answers)
        if isinstance(entry, PrunedEntry):
            macs += entry.model.madtp.macs() * len(answers)
            layers = _pruned_tokens(entry.model)
        else:
            layers = _dense_tokens(entry, batch)
        for layer in layers:
            counts[layer.modality][layer.name].append(layer.tokens)
        advance()
    means = {
        modality: tuple(float(torch.cat(kept).float().mean()) for kept in sites.values())
        for modality, sites in counts.items()
    }
    return _Result(correct / total, macs / total if isinstance(entry, PrunedEntry) else None, means)


@torch.inference_mode()
def _dense_macs(pruned: PrunedModel, batches: Sequence[Batch], advance: Callable[[], None]) -> float:
    """Mean MACs of a sample in the dense model, by the cost table of a pruned one, which saves another capture."""
    macs = 0.0
    total = 0
    for batch in batches:
        with pruned.madtp.dense():
            pruned(**inputs_of(batch))
            macs += pruned.madtp.macs() * len(batch["labels"])
        total += len(batch["labels"])
        advance()
    return macs / total


class _LayerTokens(NamedTuple):
    """The number of tokens after one layer, for each sample or image."""

    modality: str
    name: str
    tokens: Tensor


def _pruned_tokens(model: PrunedModel) -> list[_LayerTokens]:
    """Tokens after each site in the last forward, in the order of the layers."""
    kept = model.madtp.token_counts()
    return [_LayerTokens(site.modality, site.name, kept[site.name]) for site in model.madtp.report.sites]


def _dense_tokens(entry: DenseEntry, batch: Batch) -> list[_LayerTokens]:
    """Tokens after each layer of the dense model: all of the image, and the text without padding."""
    vision, text = entry.model.config.vision, entry.model.config.text
    valid = batch["attention_mask"].sum(1)
    images = torch.full((len(valid),), vision.tokens)
    return [_LayerTokens("image", f"layer {i}", images) for i in range(vision.depth)] + [
        _LayerTokens("text", f"layer {i}", valid) for i in range(text.depth)
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
