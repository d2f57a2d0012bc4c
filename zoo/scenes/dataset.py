"""Scenes as data sets: :class:`SceneDataset` for evaluation and :func:`draw_sample` for everything beneath it.

Items follow the interface of the NLVR2 loader: dict(images, statement, label, kind, id). :func:`collate` makes a batch
that a BLIP-NLVR model takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from madtp.errors import DataError
from zoo.scenes.drawing import Annotation, draw_pictures
from zoo.scenes.layout import draw_pair
from zoo.scenes.objects import CANVAS, SPLITS, Pair, draws_for
from zoo.scenes.phrases import Census
from zoo.scenes.statements import KINDS, Statement, draw_statement
from zoo.scenes.tokens import encode

MEAN = STD = 0.5
"""Normalisation of pictures, every channel: (x / 255 - MEAN) / STD."""


class Item(TypedDict):
    """One statement about one pair of pictures; label 1 is true."""

    images: Tensor
    statement: str
    label: int
    kind: str
    id: str


class Batch(TypedDict):
    """Tensors ``images`` ``[B, 2, 3, H, W]``, ``input_ids`` and ``attention_mask`` ``[B, T]``, ``labels`` ``[B]``."""

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Sample:
    """A pair with its pictures.

    Attributes:
        pair: What the pictures hold.
        images: The pictures, uint8 ``[2, 3, CANVAS, CANVAS]``.
        annotation: What their patches show.
        statements: Statements about the pair.
    """

    pair: Pair
    images: Tensor
    annotation: Annotation
    statements: tuple[Statement, ...]


def draw_sample(seed: int, split: str, index: int, statements: int = 1, kinds: Sequence[str] = ()) -> Sample:
    """Draw a pair and statements about it; the same arguments always give the same sample.

    Pictures and first statements do not depend on how many statements are asked for.

    Args:
        seed: Edition of the data set.
        split: "train", "val" or "test".
        index: Number of the item.
        statements: Number of statements.
        kinds: Kinds of statement to choose from, all equally likely; one that is listed twice is twice as likely. Empty for
            all kinds.

    Raises:
        DataError: The split or a kind is unknown, or seed or index is negative.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise DataError(f"scenes have no statements of kind {unknown[0]!r}; the kinds are {', '.join(KINDS)}")
    draws = draws_for(seed, split, index)
    pair = draw_pair(draws)
    images, annotation = draw_pictures(pair, draws)
    census = Census(pair)
    drawn = tuple(draw_statement(census, draws, kinds or tuple(KINDS)) for _ in range(statements))
    return Sample(pair, torch.from_numpy(images), annotation, drawn)


class SceneDataset(Dataset[Item]):
    """Held-out or training items of the scenes data, drawn when asked for.

    Args:
        split: "train", "val" or "test"; no two splits share an item.
        size: Number of items.
        seed: Edition of the data set; any integer gives one.
        image_size: Side of the pictures in pixels. Pictures are drawn at 96 pixels and resampled to other sizes.

    Raises:
        DataError: The split is unknown, or a number is out of range.
    """

    def __init__(self, split: str, size: int, seed: int = 0, image_size: int = CANVAS) -> None:
        if split not in SPLITS:
            raise DataError(f"scenes have no split {split!r}; choose one of {', '.join(SPLITS)}")
        if size < 1 or image_size < 8:
            raise DataError(f"a scenes data set needs size >= 1 and image_size >= 8, found {size} and {image_size}")
        self.split = split
        self.size = size
        self.seed = seed
        self.image_size = image_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.size:
            raise IndexError(f"item {index} of a scenes data set of {self.size}")
        sample = draw_sample(self.seed, self.split, index)
        statement = sample.statements[0]
        return Item(
            images=resize(sample.images, self.image_size),
            statement=statement.text,
            label=int(statement.label),
            kind=statement.kind,
            id=f"scenes-{self.seed}-{self.split}-{index}",
        )


def resize(images: Tensor, image_size: int) -> Tensor:
    """Resample pictures to a square size with anti-aliasing; the same size changes nothing.

    Args:
        images: uint8 ``[..., 3, H, W]``.
        image_size: Height and width of the result, in pixels.

    Returns:
        uint8 ``[..., 3, image_size, image_size]``.
    """
    if images.shape[-1] == image_size:
        return images
    flat = images.flatten(0, -4).float()
    small = F.interpolate(flat, size=(image_size, image_size), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).reshape(*images.shape[:-2], image_size, image_size)


def normalise(images: Tensor) -> Tensor:
    """Return uint8 images ``[..., 3, H, W]`` as the floats that the models take, -1 to 1, in the same shape."""
    return (images.float() / 255 - MEAN) / STD


def collate(items: Sequence[Item]) -> Batch:
    """Return items as one batch, with statements padded to the longest."""
    ids, mask = encode([item["statement"] for item in items])
    return Batch(
        images=normalise(torch.stack([item["images"] for item in items])),
        input_ids=ids,
        attention_mask=mask,
        labels=torch.tensor([item["label"] for item in items]),
    )
