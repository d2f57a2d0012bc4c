"""The LLaVA family. ``model.py`` builds the small one, ``conversation.py`` spells what it is asked and answers.

Importing this package registers the model.
"""

from __future__ import annotations

from torch import nn

from zoo.registry import register


@register(
    "llava_mini",
    description="LLaVA's code with the tower of clip_mini and a small decoder; answers questions about scenes",
    input_size=(3, 96, 96),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    licence="Apache-2.0",
    paper="https://arxiv.org/abs/2304.08485",
)
def llava_mini() -> nn.Module:
    """144 image tokens, 6 vision layers of width 128, and 5 decoder layers of width 192 with 6 heads on 2 key heads."""
    from zoo.llava.model import build

    return build()
