"""What the names of fields cannot tell about small configurations, by configuration class or model class.

`FIELDS` holds values to set after shrinking, `BUILDERS` functions for configurations made of others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 8,
}

_SWIN = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 2}
_SHUFFLED = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "intermediate_size": 256}
_TWO_LEVELS = {"vision_output_dim": 128, "intermediate_layers_indices": [1]}
_SEGMENTER = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_ROTARY = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
}
_TILES = {"image_grid_pinpoints": [[64, 64]]}

# What an EfficientNet's channels are before they are scaled by a width.
_EFFICIENT = {
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 64],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
}

FIELDS: dict[str, dict[str, Any]] = {
    "AlignConfig": {"vision_config": _EFFICIENT},
    "AriaConfig": {"projector_patch_to_query_dict": {64: 4}},
    "BeitForSemanticSegmentation": {**_SEGMENTER, "out_features": [f"stage{n}" for n in range(1, 5)]},
    "Blip2Config": {"image_token_index": 127, "num_query_tokens": 4, "use_decoder_only_language_model": True},
    "Blip2ForImageTextRetrieval": {"qformer_config": {"use_qformer_text_input": True}},
    "Blip2TextModelWithProjection": {"qformer_config": {"use_qformer_text_input": True}},
    "BridgeTowerConfig": {"contrastive_hidden_size": 32, "logit_scale_init_value": 2.6},
    "BrosConfig": {"dim_bbox_projection": 16, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2},
    "CanineConfig": {"num_hash_buckets": 256},
    "DPTConfig": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "DonutSwinConfig": _SWIN,
    "EsmConfig": {"vocab_size": 32, "pad_token_id": 1, "mask_token_id": 31},
    "FunnelConfig": {"block_sizes": [1, 1, 1], "block_repeats": [1, 1, 1]},
    "GroundingDinoConfig": {"num_queries": 16},
    "Gemma3Config": {"mm_tokens_per_image": 16},
    "HieraConfig": {"embed_dim": 16},
    "InstructBlipConfig": {"image_token_index": 127, "num_query_tokens": 4},
    "LEDConfig": {"attention_window": [16, 16]},
    "LayoutLMv3Config": {"coordinate_size": 12, "shape_size": 8},
    "LevitConfig": {"patch_size": 16, "image_size": 128},
    "LiltConfig": {"hidden_size": 96},
    "LlavaNextConfig": _TILES,
    "LlavaOnevisionConfig": _TILES,
    "Llama4Config": {"vision_config": _SHUFFLED},
    "Llama4VisionConfig": _SHUFFLED,
    "MllamaVisionConfig": _TWO_LEVELS,
    "MllamaConfig": {"vision_config": _TWO_LEVELS, "text_config": {"cross_attention_layers": [1]}},
    "MobileBertConfig": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32, "intermediate_size": 64},
    "Qwen2VLConfig": _ROTARY,
    "Qwen2_5_VLConfig": _ROTARY,
    "Qwen3VLConfig": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "Glm4vConfig": _ROTARY,
    "Glm46VConfig": _ROTARY,
    "GlmOcrConfig": _ROTARY,
    "PerceiverConfig": {"image_size": 64, "num_latents": 16, "d_latents": 64, "d_model": 64, "num_self_attends_per_block": 2},
    "SamConfig": {
        "prompt_encoder_config": {"image_size": 64, "patch_size": 8, "hidden_size": 64},
        "vision_config": {"output_channels": 64, "window_size": 4},
    },
    "Siglip2Config": {"vision_config": {"num_patches": 64}},
    "Siglip2VisionConfig": {"num_patches": 64},
    "SwinConfig": _SWIN,
    "Swinv2Config": {**_SWIN, "pretrained_window_sizes": [0, 0, 0, 0]},
    "ViltForImagesAndTextClassification": {"num_images": 2, "modality_type_vocab_size": 3},
    "VipLlavaConfig": {"vision_feature_layers": [-1, -2]},
    "VitMatteConfig": {"backbone_config": {"patch_size": 16}},
    "VivitConfig": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "XLNetConfig": {"d_head": 16},
    "XmodConfig": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip


def _vision_encoder_decoder() -> Any:
    import transformers

    encoder = transformers.ViTConfig(**_VISION)
    decoder = transformers.BertConfig(**_TEXT, is_decoder=True, add_cross_attention=True)
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


def _vision_text_dual_encoder() -> Any:
    import transformers

    vision, text = transformers.ViTConfig(**_VISION), transformers.BertConfig(**_TEXT)
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=64)


BUILDERS: dict[str, Callable[[], Any]] = {
    "VisionEncoderDecoderConfig": _vision_encoder_decoder,
    "VisionTextDualEncoderConfig": _vision_text_dual_encoder,
}
