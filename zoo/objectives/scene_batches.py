"""Batches of pictures of scenes with their annotations: :func:`draw_batch` for single pictures, :func:`make_batch` for pairs.

Texts about single pictures are added by the objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoo.objectives.auxiliary_heads import KINDS_OF_THINGS
from zoo.scenes import draw_sample, encode, normalise
from zoo.scenes.objects import COLOURS, SHAPES, Thing
from zoo.scenes.phrases import Census
from zoo.scenes.statements import KINDS, Statement

KIND_NAMES = tuple(KINDS)
"""Kinds of statement; a batch holds their numbers."""

_NOWHERE = (math.nan,) * 4
"""Places of a statement that is not spatial."""


@dataclass(frozen=True)
class Picture:
    """One picture of a pair.

    Attributes:
        census: What both pictures of the pair hold.
        side: 0 for the left picture, 1 for the right.
        seed: Edition of the data that the pair was drawn from.
        split: "train", "val" or "test".
        index: Number of the pair.
    """

    census: Census
    side: int
    seed: int
    split: str
    index: int

    @property
    def things(self) -> tuple[Thing, ...]:
        """What the picture shows."""
        return self.census.pair.pictures[self.side]


def draw_batch(seed: int, split: str, start: int, pictures: int) -> tuple[list[Picture], dict[str, Tensor]]:
    """Draw B = ``pictures`` pictures from number ``start`` on; each pair has two of them.

    Returns:
        The pictures, and tensors: ``images`` ``[B, 3, H, W]``, ``labels_of_patches`` ``[B, 4, P]``, ``outline``
        ``[B, P, PATCH * PATCH]``, ``centre`` ``[B, P, 2]``, and ``things`` ``[B, KINDS_OF_THINGS]``, how many there are of each
        size, colour and shape.
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


def make_batch(
    split: str, seed: int, start: int, pairs: int, *, statements: int = 0, kinds: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Draw the pairs ``start`` to ``start + pairs - 1``, and statements about each.

    Args:
        split: "train", "val" or "test".
        seed: Edition of the data.
        start: Number of the first pair.
        pairs: B.
        statements: S; 0 leaves texts out.
        kinds: Kinds of statement to choose from, see :func:`zoo.scenes.draw_sample`.

    Returns:
        ``images`` ``[B, 2, 3, H, W]`` and the annotation of both pictures. With statements also ``input_ids`` and
        ``attention_mask`` ``[B, S, T]``, ``labels`` and ``kinds`` (numbers of :data:`KIND_NAMES`) ``[B, S]``, ``counts``
        ``[B, S, 2]``, ``places`` ``[B, S, 4]``, and ``spatial``, the number of statements that have places.
    """
    samples = [draw_sample(seed, split, start + number, statements, kinds) for number in range(pairs)]
    batch = {
        "images": normalise(torch.stack([sample.images for sample in samples])),
        "labels_of_patches": torch.from_numpy(np.stack([sample.annotation.labels for sample in samples])),
        "outline": torch.from_numpy(np.stack([sample.annotation.outline for sample in samples])),
        "centre": torch.from_numpy(np.stack([sample.annotation.centre for sample in samples])),
    }
    if statements:
        drawn = [statement for sample in samples for statement in sample.statements]
        batch |= {name: value.reshape(pairs, statements, *value.shape[1:]) for name, value in _encode(drawn).items()}
        batch["spatial"] = (~batch["places"][..., 0].isnan()).sum().float()
    return batch


def _encode(statements: Sequence[Statement]) -> dict[str, Tensor]:
    """Return all that a batch holds of its statements, as tensors whose first axis is theirs."""
    ids, mask = encode([statement.text for statement in statements])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "counts": torch.tensor([statement.counts for statement in statements]),
        "places": torch.tensor([statement.places or _NOWHERE for statement in statements]),
        "labels": torch.tensor([int(statement.label) for statement in statements]),
        "kinds": torch.tensor([KIND_NAMES.index(statement.kind) for statement in statements]),
    }
