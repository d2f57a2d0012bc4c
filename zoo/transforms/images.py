"""Turn RGB images into the tensors that models take, as BLIP does: :func:`evaluation` and :func:`training`."""

from __future__ import annotations

from collections.abc import Sequence

from madtp.errors import ConfigError
from zoo.datasets.records import Transform
from zoo.registry import describe
from zoo.transforms.augment import RandomAugment

SMALLEST_CROP = 0.5
"""Least share of an image's area that a training crop covers, in BLIP's fine-tuning."""


def evaluation(size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Return a transform to ``[3, size, size]``, which scales pixels to [0, 1] and normalises.

    Images are resized (bicubic) whatever their aspect ratio.
    """
    from torchvision import transforms

    _check(size)
    resize = transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC)
    composed: Transform = transforms.Compose([resize, *_finish(mean, std)])
    return composed


def training(size: int, mean: Sequence[float], std: Sequence[float], smallest_crop: float = SMALLEST_CROP) -> Transform:
    """Return a transform as :func:`evaluation` does, of a random crop that is flipped at random and augmented.

    Randomness is torch's. Each image of a pair is cropped and flipped by itself, as BLIP does.
    """
    from torchvision import transforms

    _check(size)
    if not 0 < smallest_crop <= 1:
        raise ConfigError(f"smallest_crop is {smallest_crop}; it is a share in (0, 1].")
    crop = transforms.RandomResizedCrop(
        size, scale=(smallest_crop, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
    )
    composed: Transform = transforms.Compose(
        [crop, transforms.RandomHorizontalFlip(), RandomAugment(), *_finish(mean, std)]
    )
    return composed


def for_model(name: str) -> Transform:
    """Return the evaluation transform with the image size and normalisation of a model of the zoo."""
    entry = describe(name)
    return evaluation(entry.input_size[1], entry.mean, entry.std)


def _finish(mean: Sequence[float], std: Sequence[float]) -> list[object]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize(tuple(mean), tuple(std))]


def _check(size: int) -> None:
    if size < 1:
        raise ConfigError(f"the image size is {size}; it has to be at least 1.")
