"""Pictures for models with random weights: :func:`draw_pictures`.

Such a model keeps many tokens of noise and few of a flat region, so pictures that differ in how much of them is busy keep
different numbers of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GOLDEN = 0.6180339887498949
SHAPES = 4


def draw_pictures(count: int, size: tuple[int, int, int], seed: int) -> Tensor:
    """Return normalised pictures, ``[count, channels, height, width]``, no two alike.

    Each has a flat ground, a few plain shapes, and a band of texture and noise that covers 15% to 85% of it. The shares follow
    a sequence that fills this range evenly, however many pictures are drawn.

    Args:
        count: number of pictures.
        size: channels, height and width.
        seed: another seed draws others.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_draw(size, 0.15 + 0.7 * ((0.5 + number * GOLDEN) % 1), generator) for number in range(count)])


def _draw(size: tuple[int, int, int], busy: float, generator: torch.Generator) -> Tensor:
    channels, height, width = size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def below(limit: int) -> int:
        return int(torch.randint(max(1, limit), (1,), generator=generator))

    picture = normal(channels, 1, 1).expand(size) + 0.02 * normal(*size)
    for _ in range(SHAPES):
        side = max(1, height // 12 + below(height // 6))
        top, left = below(height - side), below(width - side)
        picture[:, top : top + side, left : left + side] = 1.5 * normal(channels, 1, 1)
    columns = max(1, round(busy * width))
    start = below(width - columns + 1)
    coarse = normal(1, channels, max(1, height // 4), max(1, columns // 4))
    texture = F.interpolate(coarse, (height, columns), mode="bilinear")[0]
    noisy = height // 2
    picture[:, :, start : start + columns] += texture
    picture[:, :noisy, start : start + columns] += normal(channels, noisy, columns)
    return picture
