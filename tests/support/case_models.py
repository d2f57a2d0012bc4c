"""Small models of every kind that has to be rewritten without help. Start at :data:`CASES`; `model_case.py` says what a
case states.

Models of transformers skip their tests where that library is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_case import DEPTH, END, PATCH, VOCABULARY, WIDTH, Case, Keys, Tensors, lively, positions_mask, text
from torch import nn
from two_towers import tower_case


def vit(**options: Any) -> nn.Module:
    """A small timm VisionTransformer; weights large enough that tokens differ."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=2, mlp_ratio=2, num_classes=5, **options
    )
    return lively(model)


def _vit_pool(first: int) -> Callable[..., Tensors]:
    def repool(model: nn.Module, inputs: Tensors, tokens: Tensors, kept: Tensors) -> Tensors:
        use = kept["image"].clone()
        use[:, :first] = False
        weight = use[:, :, None].float()
        mean = (tokens["image"] * weight).sum(1) / weight.sum(1)
        return {"": model.head(model.fc_norm(mean))}  # type: ignore[operator]

    return repool


def _vit_case(name: str, prefix: int, pool: str = "token", **options: Any) -> Case:
    return Case(
        name=name,
        build=lambda: vit(global_pool=pool, **options),
        inputs=lambda batch, length: {"x": torch.randn(batch, 3, 32, 32)},
        keys=(Keys(r"^blocks\.(\d+)\.attn", "image"), Keys(r"^attn_pool", "image", skip=prefix)),
        layers={"image": DEPTH},
        residual={"image": "blocks.{}.norm2:input"},
        final={"image": "norm"},
        norm={"image": "norm"},
        protected=lambda inputs: {"image": positions_mask(len(inputs["x"]), 16 + prefix, *range(prefix))},
        repool=_vit_pool(prefix) if pool == "avg" else None,
    )


def _towers(**text_options: Any) -> dict[str, Any]:
    text_config = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 20,
        "projection_dim": WIDTH,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": 0,
        "encoder_hidden_size": WIDTH,
        "sep_token_id": 3,
        "attention_dropout": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        **text_options,
    }
    vision_config = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": PATCH,
        "attention_dropout": 0.1,
    }
    return {"text_config": text_config, "vision_config": vision_config, "projection_dim": WIDTH}


def _hf(model: str, config: str, spelling: str, seed: int = 7, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    settings = getattr(transformers, config)(**_towers(**options))
    return lively(getattr(transformers, model)._from_config(settings, attn_implementation=spelling), seed)


def _hf_inputs(batch: int, length: int) -> Tensors:
    return {"pixel_values": torch.randn(batch, 3, 32, 32), **text(batch, length)}


def _clip_protected(inputs: Tensors) -> Tensors:
    batch = len(inputs["input_ids"])
    return {"image": positions_mask(batch, 17, 0), "text": inputs["input_ids"] == END}


def _clip(name: str, spelling: str, **options: Any) -> Case:
    return Case(
        name=name,
        build=lambda: _hf("CLIPModel", "CLIPConfig", spelling, **options),
        inputs=_hf_inputs,
        keys=(
            Keys(r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", "image"),
            Keys(r"^text_model\.encoder\.layers\.(\d+)\.self_attn", "text"),
        ),
        layers={"image": DEPTH, "text": DEPTH},
        residual={
            "image": "vision_model.encoder.layers.{}.layer_norm2:input",
            "text": "text_model.encoder.layers.{}.layer_norm2:input",
        },
        final={"image": f"vision_model.encoder.layers.{DEPTH - 1}", "text": "text_model.final_layer_norm"},
        norm={"image": None, "text": "text_model.final_layer_norm"},
        protected=_clip_protected,
        full={"vision_model_output.last_hidden_state": "image", "text_model_output.last_hidden_state": "text"},
        coupled=("logits_per_image", "logits_per_text"),
        exact=spelling == "sdpa",
    )


def _siglip_protected(inputs: Tensors) -> Tensors:
    batch, length = inputs["input_ids"].shape
    return {"image": positions_mask(batch, 16), "text": positions_mask(batch, length, -1)}


def _siglip(name: str, spelling: str) -> Case:
    return Case(
        name=name,
        build=lambda: _hf("SiglipModel", "SiglipConfig", spelling),
        inputs=_hf_inputs,
        keys=(
            Keys(r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", "image"),
            Keys(r"^vision_model\.head\.attention", "image"),
            Keys(r"^text_model\.encoder\.layers\.(\d+)\.self_attn", "text"),
        ),
        layers={"image": DEPTH, "text": DEPTH},
        residual={
            "image": "vision_model.encoder.layers.{}.layer_norm2:input",
            "text": "text_model.encoder.layers.{}.layer_norm2:input",
        },
        final={"image": "vision_model.post_layernorm", "text": "text_model.final_layer_norm"},
        norm={"image": "vision_model.post_layernorm", "text": "text_model.final_layer_norm"},
        protected=_siglip_protected,
        full={"vision_model_output.last_hidden_state": "image", "text_model_output.last_hidden_state": "text"},
        coupled=("logits_per_image", "logits_per_text"),
        exact=False,
    )


def _first_tokens(inputs: Tensors) -> Tensors:
    batch, length = inputs["input_ids"].shape
    return {"image": positions_mask(batch, 17, 0), "text": positions_mask(batch, length, 0)}


def _blip(name: str) -> Case:
    return Case(
        name=name,
        # Weights of which the matching score is no small difference of large numbers, which would show rounding.
        build=lambda: _hf("BlipForImageTextRetrieval", "BlipConfig", "eager", seed=8),
        inputs=_hf_inputs,
        keys=(
            Keys(r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", "image"),
            Keys(r"^text_encoder\.encoder\.layer\.(\d+)\.attention", "text"),
            Keys(r"^text_encoder\.encoder\.layer\.\d+\.crossattention", "image"),
        ),
        layers={"image": DEPTH, "text": DEPTH},
        residual={
            "image": "vision_model.encoder.layers.{}.layer_norm2:input",
            "text": "text_encoder.encoder.layer.{}.attention.output.LayerNorm:output",
        },
        final={"image": "vision_model.post_layernorm", "text": f"text_encoder.encoder.layer.{DEPTH - 1}.output"},
        norm={"image": "vision_model.post_layernorm", "text": None},
        protected=_first_tokens,
        full={"last_hidden_state": "image", "question_embeds": "text"},
        exact=False,
    )


def _nlvr() -> nn.Module:
    from zoo.blip.config import NlvrConfig, TextConfig, VisionConfig
    from zoo.blip.nlvr import BlipNlvr

    config = NlvrConfig(
        vision=VisionConfig(image_size=16, patch_size=4, width=24, depth=DEPTH, heads=2, mlp_width=32),
        text=TextConfig(
            vocabulary=VOCABULARY, positions=20, width=WIDTH, depth=DEPTH, heads=2, mlp_width=32, merge_from_layer=1
        ),
    )
    return lively(BlipNlvr(config))


def _nlvr_protected(inputs: Tensors) -> Tensors:
    batch, length = inputs["input_ids"].shape
    return {"image": positions_mask(2 * batch, 17, 0), "text": positions_mask(batch, length, 0)}


NLVR = Case(
    name="blip_nlvr",
    build=_nlvr,
    inputs=lambda batch, length: {"images": torch.randn(batch, 2, 3, 16, 16), **text(batch, length)},
    keys=(
        Keys(r"^visual_encoder\.blocks\.(\d+)\.attn", "image"),
        Keys(r"^text_encoder\.encoder\.layer\.(\d+)\.attention", "text"),
        Keys(r"^text_encoder\.encoder\.layer\.\d+\.crossattention\.self0", "image", 0),
        Keys(r"^text_encoder\.encoder\.layer\.\d+\.crossattention\.self1", "image", 1),
    ),
    layers={"image": DEPTH, "text": DEPTH},
    residual={
        "image": "visual_encoder.blocks.{}.norm2:input",
        "text": "text_encoder.encoder.layer.{}.attention.output:output",
    },
    final={"image": "visual_encoder", "text": "text_encoder"},
    norm={"image": "visual_encoder.norm", "text": None},
    protected=_nlvr_protected,
)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _vit_case("vit", 1),
        _vit_case("vit_registers", 3, reg_tokens=2, init_values=0.5),
        _vit_case("vit_mean", 1, pool="avg"),
        _vit_case("vit_mean_no_class", 0, pool="avg", class_token=False),
        _vit_case("vit_attention_pool", 1, pool="map"),
        _clip("clip_sdpa", "sdpa"),
        _clip("clip_eager", "eager", eos_token_id=2),
        _siglip("siglip_sdpa", "sdpa"),
        _siglip("siglip_eager", "eager"),
        _blip("blip_itm"),
        NLVR,
        tower_case("towers_batch_first_post", True, False, mean=True),
        tower_case("towers_batch_first_pre", True, True, mean=False),
        tower_case("towers_sequence_first_post", False, False, mean=False),
        tower_case("towers_sequence_first_pre", False, True, mean=True),
    )
}
