"""A vision transformer that is rewritten in a second or two, with inputs; shared by tests that need some pruned model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import madtp
from madtp import PrunedModel, PruningConfig

_REWRITTEN: dict[str, PrunedModel] = {}


def vit(depth: int = 4, width: int = 32) -> nn.Module:
    """Random weights, the same at every call; 64 patches and a class token."""
    torch.manual_seed(3)
    return VisionTransformer(img_size=64, patch_size=8, embed_dim=width, depth=depth, num_heads=2, num_classes=5).eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def rewritten(depth: int = 4, **settings: Any) -> PrunedModel:
    """A model of its own; what is asked for again is copied, as a rewrite takes most of the time of a test."""
    key = repr((depth, sorted(settings.items())))
    if key not in _REWRITTEN:
        config = PruningConfig(**{"alignment_tokens": 8, **settings})
        _REWRITTEN[key] = madtp.rewrite(vit(depth), (images(2, 0),), config=config)
    return copy.deepcopy(_REWRITTEN[key])
