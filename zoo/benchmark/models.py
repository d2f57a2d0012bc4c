"""A model to be measured, with batches for it: :func:`open_model`.

Models with shipped weights get samples of the data that they were trained for. All others have random weights and get drawn
pictures; their texts have random words and different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from zoo.benchmark.pictures import draw_pictures
from zoo.datasets import describe_data, list_data
from zoo.examples import example_inputs, find_model
from zoo.recipes.model_card import held_out_calls
from zoo.registry import create, describe, list_models
from zoo.tasks.registry import task_of

Batch = dict[str, Any]
"""Keyword arguments of a model."""

TIMM = "timm:"
DENSE = "dense"
DATA_SAMPLES, DRAWN_SAMPLES, CALIBRATION_BATCH = 64, 16, 8


@dataclass(frozen=True)
class OpenedModel:
    """A dense model, and where its samples come from.

    Attributes:
        name: as it was asked for.
        dense: in eval mode.
        data: name of its data set; None where pictures are drawn.
        seed: edition of the samples.
        pruned: pruned models with weights of their own, by checkpoint.
    """

    name: str
    dense: nn.Module
    data: str | None
    seed: int
    pruned: dict[str, PrunedModel]

    def samples(self, count: int, size: int, *, calibration: bool = False) -> list[Batch]:
        """Return ``count`` different samples in batches of ``size``; those for calibration are others than those to time."""
        if self.data is not None:
            split = "val" if calibration else "test"
            return held_out_calls(self.name, self.data, split=split, items=count, seed=self.seed, batch_size=size)
        whole = _drawn(self.dense, count, self.seed + (1_000_003 if calibration else 0))
        return [_part(whole, start, min(start + size, count)) for start in range(0, count, size)]

    def calibration(self, count: int | None = None) -> list[Batch]:
        """Return samples to calibrate on; None takes 64 of data, or 16 drawn ones."""
        count = count or (DRAWN_SAMPLES if self.data is None else DATA_SAMPLES)
        return self.samples(count, min(CALIBRATION_BATCH, count), calibration=True)

    def reopened(self, checkpoint: str) -> PrunedModel:
        """Return another copy of a pruned model, whose settings may be changed."""
        model = create(self.name, checkpoint)
        assert isinstance(model, PrunedModel)
        return model


def open_model(name: str, checkpoints: Sequence[str], seed: int) -> OpenedModel:
    """Open a model of the zoo, or one of timm with random weights.

    Args:
        name: of the zoo, or of timm (``timm:vit_base_patch16_384``; the prefix may be left out).
        checkpoints: weights of the dense model and of pruned ones. Without any, the shipped dense weights are taken where there
            are some, else random ones.
        seed: of random weights, pictures and data.

    Raises:
        UnknownModelError: there is no such model.
        CheckpointError: a checkpoint does not belong to it.
        ConfigError: checkpoints were named for a model of timm, or several dense ones.
    """
    torch.manual_seed(seed)
    plain = name.removeprefix(TIMM)
    if plain != name or name not in list_models():
        found = find_model(plain).model
        if checkpoints:
            raise ConfigError(f"{name} is a model of timm, so it has no checkpoints; leave out --checkpoint.")
        return OpenedModel(name, found, None, seed, {})
    opened = {checkpoint: create(name, checkpoint) for checkpoint in checkpoints}
    pruned = {checkpoint: model for checkpoint, model in opened.items() if isinstance(model, PrunedModel)}
    dense = [model for model in opened.values() if not isinstance(model, PrunedModel)]
    if len(dense) > 1:
        raise ConfigError(f"{len(dense)} of the checkpoints are dense models; give one, and pruned ones beside it.")
    shipped = describe(name).checkpoints
    if not dense:
        dense = [create(name, DENSE if DENSE in shipped else None)]
    return OpenedModel(name, dense[0], _data_for(name) if shipped else None, seed, pruned)


def _data_for(name: str) -> str:
    task = task_of(name)
    return next(data for data in list_data("scenes*") if task in describe_data(data).tasks)


def _drawn(model: nn.Module, count: int, seed: int) -> Batch:
    """The example inputs of a model with drawn pictures in place of noise, and texts of different lengths."""
    given = example_inputs(model, count)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 4 and value.shape[-3] in (1, 3):
            pictures = draw_pictures(value[..., 0, 0, 0].numel(), (value.shape[-3], *value.shape[-2:]), seed)
            given[name] = pictures.reshape(value.shape)
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask == 1).all()):
        length = mask.shape[1]
        ends = torch.randint(length // 2, length + 1, (count, 1), generator=torch.Generator().manual_seed(seed))
        ends[0] = length
        given["attention_mask"] = (torch.arange(length) < ends).to(mask.dtype)
    return given


def _part(whole: Batch, start: int, end: int) -> Batch:
    return {name: value[start:end] if isinstance(value, Tensor) else value for name, value in whole.items()}


def cast_batch(dtype: torch.dtype, batch: Batch) -> Batch:
    """Return a batch with its floating-point tensors in a dtype."""

    def change(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: change(value) for name, value in batch.items()}
