"""The CLIP family. ``config.py`` holds sizes, ``model.py`` the model, ``checkpoint.py`` key names.

Importing this package registers the models.
"""

from __future__ import annotations

from torch import nn

from zoo.registry import register

_PAPER = "https://arxiv.org/abs/2103.00020"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _build(size: str) -> nn.Module:
    from zoo.clip import config
    from zoo.clip.model import Clip

    return Clip(getattr(config, size))


@register(
    "clip_vit_b16",
    description="CLIP with ViT-B/16 at 224, for image-text retrieval",
    input_size=(3, 224, 224),
    mean=_MEAN,
    std=_STD,
    licence="MIT (published weights)",
    paper=_PAPER,
)
def clip_vit_b16() -> nn.Module:
    """150 M parameters."""
    return _build("VIT_B16")


@register(
    "clip_vit_l14_336",
    description="CLIP with ViT-L/14 at 336, for image-text retrieval",
    input_size=(3, 336, 336),
    mean=_MEAN,
    std=_STD,
    licence="MIT (published weights)",
    paper=_PAPER,
)
def clip_vit_l14_336() -> nn.Module:
    """428 M parameters; the size that the MADTP paper compresses."""
    return _build("VIT_L14_336")


@register(
    "clip_mini",
    description="The architecture of clip_vit_b16, small enough to train on two cores; for the scenes data",
    input_size=(3, 96, 96),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    licence="Apache-2.0",
    paper=_PAPER,
)
def clip_mini() -> nn.Module:
    """144 patches an image, width 128, 6 vision and 4 text layers."""
    return _build("MINI")
