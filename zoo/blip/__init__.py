"""The BLIP family. `config.py` holds sizes, `nlvr.py` the model, `text.py` its text encoder, `checkpoint.py` key names.

Importing this package registers the models; timm is imported when one is built.
"""

from __future__ import annotations

from torch import nn

from zoo.registry import register

_PAPER = "https://arxiv.org/abs/2201.12086"


@register(
    "blip_nlvr",
    description="BLIP base for statements about two images (NLVR2): ViT-B/16 at 384, BERT base",
    input_size=(3, 384, 384),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    licence="BSD-3-Clause (published weights)",
    paper=_PAPER,
)
def blip_nlvr() -> nn.Module:
    """The published base size, 259 M parameters."""
    from zoo.blip.config import BASE
    from zoo.blip.nlvr import BlipNlvr

    return BlipNlvr(BASE)


@register(
    "blip_nlvr_mini",
    description="The architecture of blip_nlvr, small enough to train on two cores; for the scenes data",
    input_size=(3, 96, 96),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    licence="Apache-2.0",
    paper=_PAPER,
    checkpoints=("dense",),
)
def blip_nlvr_mini() -> nn.Module:
    """144 patches an image, width 128, 6 vision and 4 text layers, 2.6 M parameters."""
    from zoo.blip.config import MINI
    from zoo.blip.nlvr import BlipNlvr

    return BlipNlvr(MINI)
