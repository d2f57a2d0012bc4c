"""CLIP: images and texts, encoded separately and compared (Radford et al., 2021). Start with :class:`Clip`.

Parameter names are OpenAI's. Axes: B samples, N vision tokens (class token first), T text tokens, C width of a tower, E width
of the features.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import DataError
from zoo.checkpoints.key_table import KeyTable, Row
from zoo.clip.checkpoint import MOMENTUM_TABLE, PRUNING_ROWS, TABLES
from zoo.clip.config import ClipConfig, TowerConfig

START_TEMPERATURE = 0.07


class ClipOutput(NamedTuple):
    """What :class:`Clip` returns.

    Attributes:
        image_features: ``[B, E]``, of length 1; None without images.
        text_features: ``[B, E]``, of length 1; None without texts.
        scale: The factor on products of features, a scalar.
    """

    image_features: Tensor | None
    text_features: Tensor | None
    scale: Tensor


class QuickGelu(nn.Module):
    """``x * sigmoid(1.702 * x)``, OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class FeedForward(nn.Module):
    """``[B, N, C]`` -> ``[B, N, C]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = QuickGelu()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
        return out


class Block(nn.Module):
    """Self-attention and feed-forward, each pre-norm."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(config.width)
        self.mlp = FeedForward(config.width)
        self.ln_2 = nn.LayerNorm(config.width)
        self._init_weights(config)

    def _init_weights(self, config: TowerConfig) -> None:
        """Initialise as OpenAI does: with smaller values where a layer adds to the residual stream."""
        inner, adding = config.width**-0.5, config.width**-0.5 * (2 * config.depth) ** -0.5
        nn.init.normal_(self.attn.in_proj_weight, std=inner)
        nn.init.normal_(self.attn.out_proj.weight, std=adding)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * config.width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=adding)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """``hidden`` ``[N, N]`` bool is True where a token may not be attended."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=hidden)[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Tower(nn.Module):
    """The blocks in order, ``[B, N, C]`` -> ``[B, N, C]``."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, hidden)
        return x


class VisionTower(nn.Module):
    """Images ``[B, 3, H, W]`` -> features ``[B, E]`` of the class token, not normalised."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.vision.width
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(config.image_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Tower(config.vision)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embedding))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        features: Tensor = self.ln_post(self.transformer(x)[:, 0]) @ self.proj
        return features


class Clip(nn.Module):
    """Vision and text tower. As in OpenAI's files, the parts of the text tower are not a module of their own."""

    checkpoint_tables: ClassVar[tuple[KeyTable, ...]] = TABLES
    pruning_rows: ClassVar[tuple[Row, ...]] = PRUNING_ROWS
    momentum_table: ClassVar[KeyTable] = MOMENTUM_TABLE

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        width = config.text.width
        self.visual = VisionTower(config)
        self.transformer = Tower(config.text)
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.positions, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embedding))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / START_TEMPERATURE)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, images: Tensor | None = None, input_ids: Tensor | None = None) -> ClipOutput:
        """Encode images ``[B, 3, H, W]``, texts ``[B, T]``, or both.

        A text ends with the highest id of the vocabulary. Its feature is read there, and what follows does not matter.
        """
        if images is None and input_ids is None:
            raise DataError("pass images, input_ids or both.")
        image = None if images is None else F.normalize(self.visual(images), dim=-1)
        text = None if input_ids is None else F.normalize(self._encode_text(input_ids), dim=-1)
        return ClipOutput(image, text, self.logit_scale.exp())

    def _encode_text(self, input_ids: Tensor) -> Tensor:
        length, limit = input_ids.shape[1], self.positional_embedding.shape[0]
        if length > limit:
            raise DataError(f"The text is {length} tokens long and the model has {limit} positions; cut the text.")
        x = self.token_embedding(input_ids) + self.positional_embedding[:length]
        later = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        x = self.ln_final(self.transformer(x, later))
        ends = input_ids.argmax(dim=-1)
        features: Tensor = x[torch.arange(x.shape[0], device=x.device), ends] @ self.text_projection
        return features
