"""RandAugment (Cubuk et al. 2020) in the variant that BLIP was trained with: :class:`RandomAugment`.

It differs from the paper: an operation that was drawn is applied with probability one half, magnitudes go up to 10, and pixels
from outside the image are grey. At BLIP's magnitude 5, brightness and sharpness have factor 1 and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from madtp.errors import ConfigError

PUBLISHED_OPERATIONS = (
    "Identity",
    "AutoContrast",
    "Brightness",
    "Sharpness",
    "Equalize",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)

LARGEST = 10
GREY = (128, 128, 128)
_SHEAR, _PIXELS, _DEGREES = 0.3, 10.0, 30.0

Operation = Callable[[Image.Image, float], Image.Image]
"""Takes an RGB image and a strength: the magnitude as a fraction of :data:`LARGEST`, negative with probability one half."""


class RandomAugment:
    """Draw operations with repetition, and apply each with probability one half. Randomness is torch's.

    Args:
        count: Number of operations to draw.
        magnitude: Magnitude of all operations, 0 to :data:`LARGEST`.
        operations: Names of operations to draw from.

    Raises:
        ConfigError: A number is out of range, or an operation is unknown.
    """

    def __init__(self, count: int = 2, magnitude: int = 5, operations: Sequence[str] = PUBLISHED_OPERATIONS) -> None:
        if count < 0 or not 0 <= magnitude <= LARGEST:
            raise ConfigError(f"{count} operations of magnitude {magnitude}; a magnitude lies in 0 to {LARGEST}.")
        unknown = [name for name in operations if name not in OPERATIONS]
        if unknown or not operations:
            raise ConfigError(f"operations are some of {', '.join(OPERATIONS)}; got {', '.join(unknown) or 'none'}.")
        self.count = count
        self.magnitude = magnitude
        self.operations = tuple(operations)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the augmented RGB image, of the same size."""
        for _ in range(self.count):
            name = self.operations[int(torch.randint(len(self.operations), ()))]
            apply, negative = (torch.rand(2) < 0.5).tolist()
            if apply:
                strength = self.magnitude / LARGEST
                image = OPERATIONS[name](image, -strength if negative else strength)
        return image


def _identity(image: Image.Image, strength: float) -> Image.Image:
    del strength
    return image


def _auto_contrast(image: Image.Image, strength: float) -> Image.Image:
    from torchvision.transforms import functional

    del strength
    changed: Image.Image = functional.autocontrast(image)
    return changed


def _equalize(image: Image.Image, strength: float) -> Image.Image:
    from torchvision.transforms import functional

    del strength
    changed: Image.Image = functional.equalize(image)
    return changed


def _factor(strength: float) -> float:
    """Return a factor from 0.1 to 1.9; the sign of the strength does not matter."""
    return 0.1 + 1.8 * abs(strength)


def _brightness(image: Image.Image, strength: float) -> Image.Image:
    from torchvision.transforms import functional

    changed: Image.Image = functional.adjust_brightness(image, _factor(strength))
    return changed


def _sharpness(image: Image.Image, strength: float) -> Image.Image:
    from torchvision.transforms import functional

    changed: Image.Image = functional.adjust_sharpness(image, _factor(strength))
    return changed


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    return image.rotate(_DEGREES * strength, Image.Resampling.BILINEAR, fillcolor=GREY)


def _affine(matrix: Callable[[float], tuple[float, ...]]) -> Operation:
    """Return the operation whose matrix, given in rows, maps each pixel of the result to where it comes from."""

    def apply(image: Image.Image, strength: float) -> Image.Image:
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix(strength), Image.Resampling.BILINEAR, fillcolor=GREY
        )

    return apply


OPERATIONS: dict[str, Operation] = {
    "Identity": _identity,
    "AutoContrast": _auto_contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "Equalize": _equalize,
    "ShearX": _affine(lambda strength: (1, _SHEAR * strength, 0, 0, 1, 0)),
    "ShearY": _affine(lambda strength: (1, 0, 0, _SHEAR * strength, 1, 0)),
    "TranslateX": _affine(lambda strength: (1, 0, _PIXELS * strength, 0, 1, 0)),
    "TranslateY": _affine(lambda strength: (1, 0, 0, 0, 1, _PIXELS * strength)),
    "Rotate": _rotate,
}
