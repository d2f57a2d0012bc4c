"""Start a model from the trained weights of another one with the same towers: :func:`start_from`.

The published models of all tasks come from one pre-trained model. The minis start from the one that reasons about pairs of
pictures: from its vision tower, and from its text encoder with the attention to the first image. Text decoders start from that
encoder, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import zoo
from madtp.errors import CheckpointError
from zoo.llava.model import tower_weights

_RENAMED = (
    ("crossattention.self0.", "crossattention.self."),
    ("crossattention.output.dense0.", "crossattention.output.dense."),
)
_DECODER = ("text_encoder.", "text_decoder.bert.")

_BLOCK = (
    ("norm1.", "ln_1."),
    ("norm2.", "ln_2."),
    ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)


def start_from(model: nn.Module, name: str, checkpoint: str) -> int:
    """Copy every weight that has a counterpart of the same shape.

    Args:
        model: The model that is changed.
        name: Name of a BLIP or CLIP model in the zoo.
        checkpoint: Its weights: a file, or the name of shipped weights.

    Returns:
        The number of tensors that were copied.

    Raises:
        CheckpointError: No weight has a counterpart.
    """
    offered = _offered(zoo.create(name, checkpoint).state_dict())
    own = model.state_dict()
    taken = {key: offered[key] for key, value in own.items() if key in offered and offered[key].shape == value.shape}
    if not taken:
        raise CheckpointError(f"{type(model).__name__} has no weight in common with {name}; leave start_from empty.")
    with torch.no_grad():
        for key, value in taken.items():
            own[key].copy_(value)
    return len(taken)


def _offered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by the names that they have in other models."""
    offered = {}
    for key, value in weights.items():
        for old, new in _RENAMED:
            key = key.replace(old, new)
        offered[key] = value
        if key.startswith(_DECODER[0]):
            offered[key.replace(*_DECODER)] = value
        if key.startswith("visual_encoder.blocks."):
            offered[_block(key)] = value
    return {**offered, **tower_weights(offered)}


def _block(key: str) -> str:
    """Return the name that OpenAI gives to a weight of a vision block."""
    key = key.replace("visual_encoder.blocks.", "visual.transformer.resblocks.")
    for old, new in _BLOCK:
        key = key.replace(old, new)
    return key
