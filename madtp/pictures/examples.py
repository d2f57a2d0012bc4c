"""The data of a picture: one sample, the answers to it if there are any, and the patches that survive in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp.errors import DataError

# A dropped patch keeps this share of its contrast, so that a reader still sees what was dropped.
DROPPED_CONTRAST = 0.2
WHITE = 255.0


@dataclass(frozen=True)
class KeptPatches:
    """The patches that one pruned model keeps of one sample.

    Attributes:
        model: name of the pruned model, as in the table of measurements.
        layers: a label for each pruning site, in the order of the layers: ``"layer 1"``, ...
        kept: for each site, a bool tensor ``[images, patches]``, without the class token; patches run row by row.
        grids: for each site, the rows and columns of its patches; empty where all grids are square.
    """

    model: str
    layers: tuple[str, ...]
    kept: tuple[Tensor, ...]
    grids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.kept):
            raise DataError(
                f"{self.model}: {len(self.layers)} layer labels for {len(self.kept)} masks; give one for each."
            )

    def faded(self, site: int, image: Tensor, index: int) -> Tensor:
        """Return image number ``index`` of the sample, with what a site drops faded; see :func:`fade_dropped`."""
        return fade_dropped(image, self.kept[site][index], self.grids[site] if self.grids else None)

    def spread_layers(self, most: int) -> list[int]:
        """Return the indices of at most ``most`` sites, evenly spread, including the first and the last."""
        count = len(self.layers)
        if count <= most:
            return list(range(count))
        if most == 1:
            return [count - 1]
        return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


@dataclass(frozen=True)
class Example:
    """One sample with its answers.

    Attributes:
        statement: the statement about the images, or their names.
        truth: whether the statement is true; None where there is no statement, and so no answers.
        images: uint8 ``[images, 3, H, W]``.
        answers: name and answer of each model in the order of the table, the dense model first.
        kept_patches: what each pruned model keeps.
    """

    statement: str
    truth: bool | None
    images: Tensor
    answers: tuple[tuple[str, bool], ...]
    kept_patches: tuple[KeptPatches, ...]


def fade_dropped(image: Tensor, kept: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Return the image with its dropped patches faded towards white.

    Args:
        image: uint8 ``[3, H, W]``.
        kept: bool ``[patches]``, row by row.
        grid: rows and columns of the patches. None stands for a square grid whose side divides H and W.

    Returns:
        uint8 ``[H, W, 3]``, as picture libraries expect it.

    Raises:
        DataError: if the patches are not a square grid, or the grid does not divide the image.
    """
    height, width = image.shape[-2:]
    if grid is not None:
        return _faded(image, kept.reshape(1, 1, *grid))
    side = math.isqrt(kept.numel())
    if side * side != kept.numel() or side == 0 or height % side or width % side:
        raise DataError(
            f"{kept.numel()} patches do not tile an image of {height}x{width}; pass one bool for each patch of a square "
            "grid, without the class token."
        )
    return _faded(image, kept.reshape(1, 1, side, side))


def _faded(image: Tensor, kept: Tensor) -> Tensor:
    """The image where it is kept; ``kept`` is a grid ``[1, 1, rows, columns]``."""
    mask = F.interpolate(kept.float(), size=image.shape[-2:], mode="nearest")[0, 0].bool()
    colour = image.float()
    grey = colour.mean(0, keepdim=True).expand(3, -1, -1)
    faded = WHITE + DROPPED_CONTRAST * (grey - WHITE)
    return torch.where(mask, colour, faded).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def answer_word(answer: bool) -> str:
    """Return the word for an answer."""
    return "true" if answer else "false"


def most_layers(examples: Sequence[Example], most: int) -> int:
    """Return the number of layer panels in the widest row, at most ``most``."""
    return max((len(s.spread_layers(most)) for e in examples for s in e.kept_patches), default=0)
