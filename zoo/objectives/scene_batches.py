"""Batches of single pictures of scenes with their annotation: :func:`draw_batch`. What is said about them, a lesson adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from madtp.training.batch_shares import Batch
from zoo.objectives.auxiliary_heads import KINDS_OF_THINGS
from zoo.scenes import draw_sample, encode, normalise
from zoo.scenes.objects import COLOURS, SHAPES, Thing
from zoo.scenes.phrases import Census


@dataclass(frozen=True)
class Picture:
    """One picture of a pair, 0 left or 1 right: what it holds, and from which edition, split and index it was drawn."""

    census: Census
    side: int
    seed: int
    split: str
    index: int

    @property
    def things(self) -> tuple[Thing, ...]:
        """What it shows."""
        return self.census.pair.pictures[self.side]


def draw_batch(seed: int, split: str, start: int, pictures: int) -> tuple[list[Picture], dict[str, Tensor]]:
    """Pictures from number `start` on, B = `pictures`; a pair has two of them.

    Returns:
        the pictures; and images [B, 3, H, W], labels_of_patches [B, 4, P], outline [B, P, PATCH * PATCH], centre [B, P, 2]
        and things [B, KINDS_OF_THINGS], how many of each size, colour and shape there are.
    """
    first, skipped = divmod(start, 2)
    indices = range(first, (start + pictures + 1) // 2)
    drawn = [draw_sample(seed, split, index) for index in indices]
    listed = [
        Picture(Census(s.pair), side, seed, split, i) for i, s in zip(indices, drawn, strict=True) for side in (0, 1)
    ]
    tensors = {
        "images": normalise(torch.cat([sample.images for sample in drawn])),
        "labels_of_patches": torch.from_numpy(np.concatenate([sample.annotation.labels for sample in drawn])),
        "outline": torch.from_numpy(np.concatenate([sample.annotation.outline for sample in drawn])),
        "centre": torch.from_numpy(np.concatenate([sample.annotation.centre for sample in drawn])),
        "things": torch.stack([_count(picture.things) for picture in listed]),
    }
    wanted = slice(skipped, skipped + pictures)
    return listed[wanted], {name: value[wanted] for name, value in tensors.items()}


def _count(things: Sequence[Thing]) -> Tensor:
    kinds = [(thing.size * len(COLOURS) + thing.colour) * len(SHAPES) + thing.shape for thing in things]
    return torch.bincount(torch.tensor(kinds), minlength=KINDS_OF_THINGS)


def make_batch(split: str, seed: int, start: int, pairs: int, statements: int, kinds: Sequence[str] = ()) -> Batch:
    """Return pairs start ... start + pairs - 1: images [B, 2, 3, H, W], the annotation, and, with statements,
    input_ids and attention_mask [B, S, T], labels [B, S] and `spatial`, how many statements have places."""
    samples = [draw_sample(seed, split, start + number, statements, kinds) for number in range(pairs)]
    batch = {
        "images": normalise(torch.stack([sample.images for sample in samples])),
        "labels_of_patches": _stack([sample.annotation.labels for sample in samples]),
        "outline": _stack([sample.annotation.outline for sample in samples]),
        "centre": _stack([sample.annotation.centre for sample in samples]),
    }
    if statements:
        ids, mask = encode([statement.text for sample in samples for statement in sample.statements])
        batch["input_ids"] = ids.unflatten(0, (pairs, statements))
        batch["attention_mask"] = mask.unflatten(0, (pairs, statements))
        batch["counts"] = torch.tensor([[statement.counts for statement in s.statements] for s in samples])
        nowhere = (math.nan,) * 4
        batch["places"] = torch.tensor([[statement.places or nowhere for statement in s.statements] for s in samples])
        batch["spatial"] = (~batch["places"][..., 0].isnan()).sum().float()
        batch["labels"] = torch.tensor([[int(statement.label) for statement in s.statements] for s in samples])
    return batch


def _stack(arrays: list[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
