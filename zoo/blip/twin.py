"""Cross-attention of BLIP-NLVR's text encoder, which reads two images at once: :class:`TwinCrossAttention`.

Axes as in ``text.py``; V is the width of the vision tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.blip.config import TextConfig
from zoo.blip.text import LAYER_NORM_EPS, AttentionHeads, MakeCrossAttention


class TwinOutput(nn.Module):
    """As :class:`~zoo.blip.text.ResidualOutput` for two cross-attentions, whose projections are averaged."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense0 = nn.Linear(config.width, config.width)
        self.dense1 = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Merge the projections, each ``[B, T, C]``, into one."""
        return (first + second) / 2

    def forward(self, first: Tensor, second: Tensor, residual: Tensor) -> Tensor:
        merged = self.combine(self.dense0(first), self.dense1(second))
        normed: Tensor = self.LayerNorm(self.dropout(merged) + residual)
        return normed


class MergedTwinOutput(TwinOutput):
    """As :class:`TwinOutput`, merging by a linear layer on the concatenation ``[B, T, 2C]``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.merge_layer = nn.Linear(2 * config.width, config.width)

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        merged: Tensor = self.merge_layer(torch.cat([first, second], dim=-1))
        return merged


class TwinCrossAttention(nn.Module):
    """Cross-attention sublayer to both images, each with weights of its own; no vision token is masked."""

    def __init__(self, config: TextConfig, vision_width: int, number: int) -> None:
        super().__init__()
        self.self0 = AttentionHeads(config, vision_width)
        self.self1 = AttentionHeads(config, vision_width)
        self.output = MergedTwinOutput(config) if number >= config.merge_from_layer else TwinOutput(config)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Texts ``[B, T, C]`` and tokens of both images, each ``[B, S, V]`` -> ``[B, T, C]``."""
        out: Tensor = self.output(self.self0(x, first), self.self1(x, second), x)
        return out


def two_images(config: TextConfig, vision_width: int) -> MakeCrossAttention:
    """Layers that attend to two images; those from ``config.merge_from_layer`` on merge both by a linear layer."""
    return lambda number: TwinCrossAttention(config, vision_width, number)
