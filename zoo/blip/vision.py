"""The vision tower that all BLIP models share."""

from __future__ import annotations

from functools import partial

from torch import nn

from zoo.blip.config import VisionConfig

VISION_LAYER_NORM_EPS = 1e-6


def build_vision_tower(config: VisionConfig) -> nn.Module:
    """timm's VisionTransformer without head: images ``[B, 3, H, W]`` -> normalised tokens ``[B, N, V]``, class token first."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_width / config.width,
        drop_path_rate=config.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=VISION_LAYER_NORM_EPS),
        num_classes=0,
        global_pool="",
    )
