"""A small CLIP model and inputs for it."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.clip.config import ClipConfig, TowerConfig
from zoo.clip.model import Clip

SMALL = ClipConfig(12, 32, 8, TowerConfig(24, 2, 2), TowerConfig(16, 2, 2), vocabulary=40, positions=12)


def small(seed: int = 0, config: ClipConfig = SMALL, strength: float = 3.0) -> Clip:
    torch.manual_seed(seed)
    model = Clip(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(strength)
    return model


def inputs(batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(1, SMALL.vocabulary - 1, (batch, length))
    ids[:, -1] = SMALL.vocabulary - 1
    ids[1, 5], ids[1, 6:] = SMALL.vocabulary - 1, 0
    return {"images": torch.randn(batch, 3, 32, 32), "input_ids": ids}
