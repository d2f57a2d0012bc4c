"""``llava_mini``, built of transformers' own classes: :func:`build`. :func:`tower_weights` starts its tower from a CLIP's.

The model is :class:`transformers.LlavaForConditionalGeneration`, unchanged, so that what is measured on it holds for the code
that people deploy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from madtp.errors import ConfigError
from zoo.clip.config import MINI
from zoo.llava.conversation import BEGIN, END, IMAGE, PADDING, VOCABULARY_SIZE

IMAGE_TOKENS = MINI.image_tokens - 1
"""Image tokens of a prompt: the patches. The class token stays in the tower."""

_TOWER = "model.vision_tower."
_RENAMED = (
    ("visual.class_embedding", "embeddings.class_embedding"),
    ("visual.conv1.", "embeddings.patch_embedding."),
    ("visual.positional_embedding", "embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "pre_layrnorm."),
    ("visual.ln_post.", "post_layernorm."),
    ("visual.transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def build() -> nn.Module:
    """Return ``llava_mini`` with random weights.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise ConfigError("llava_mini is a model of transformers; pip install 'madtp[hf]'.") from error
    tower, special = MINI.vision, {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PADDING}
    vision = CLIPVisionConfig(
        hidden_size=tower.width,
        intermediate_size=4 * tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        image_size=MINI.image_size,
        patch_size=MINI.patch_size,
        projection_dim=tower.width,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    model: nn.Module = LlavaForConditionalGeneration(config)
    return model


def tower_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a vision tower with OpenAI's names (:class:`zoo.clip.model.Clip`) by those of ``llava_mini``."""
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not key.startswith("visual."):
            continue
        for old, new in _RENAMED:
            key = key.replace(old, new)
        if ".attn.in_proj_" in key:
            start, kind = key.split(".attn.in_proj_")
            for name, part in zip("qkv", torch.tensor_split(value, 3), strict=True):
                found[f"{_TOWER}{start}.self_attn.{name}_proj.{kind}"] = part
        else:
            found[_TOWER + key] = value
    return found
