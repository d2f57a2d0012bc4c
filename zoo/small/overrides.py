"""What the names of fields cannot tell about small configurations, by configuration class or model class.

:data:`FIELDS` holds values to set after shrinking, :data:`BUILDERS` functions that make configurations of several parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.small.shrink import CODES

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
_TILES = {"image_grid_pinpoints": [[64, 64]]}

# What DETRs read: the last three of a backbone's four stages, then an encoder's levels of one width.
_LEVELS = {"encoder_in_channels": [32, 64, 128], "decoder_in_channels": [64, 64, 64]}
_CONVOLUTIONAL = {
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 16, 32, 64],
    "stage_mid_channels": [8, 16, 16, 32],
    "stage_out_channels": [16, 32, 64, 128],
    "hidden_sizes": [16, 32, 64, 128],
}
# A tower of timm's with the arguments that make it small.
_TOWER = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 64}
# Configurations that are None by default.
_GEMMA_VISION = {
    "model_type": "gemma4_vision",
    **{
        name: _VISION[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    },
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": 8,
    "position_embedding_size": 64,
}
# A SAM tower in front of another one, which reads its grid of 4 by 4.
_SAM_TOWER = {"window_size": 4, "output_channels": 64, "downsample_channels": [64, 64]}
# Blocks attend within windows in front of one that attends to the whole image, and behind it. A window takes three by three of
# four by four merged patches, or six by six of eight by eight patches; those at the edges are smaller.
_WINDOWS = {"depth": 3, "fullatt_block_indexes": [1], "window_size": 48}
_WINDOWS_BY_TYPE = {
    "num_hidden_layers": 3,
    "layer_types": ["window_attention", "full_attention", "window_attention"],
    "pos_emb_height": 6,
    "pos_emb_width": 6,
}
# Patches are merged behind the second of four layers.
_MERGING = {
    "image_token_id": 124,
    "insert_layer_id": 1,
    "vision_config": {"num_hidden_layers": 4, "insert_layer_id": 1},
}
# Names of the ids that stand for the codes of an image.
_CODES = range(64, 64 + CODES)
_LETTERS = {f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(i))}Z": code for i, code in enumerate(_CODES)}
_NUMBERED = {f"<|visual token {i:06d}|>": code for i, code in enumerate(_CODES)}
_CODED = {"channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1}

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
    "Gemma3Config": {"mm_tokens_per_image": 16},
    "HieraConfig": {"embed_dim": 16},
    "InstructBlipVideoConfig": {"video_token_index": 127, "num_query_tokens": 4},
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
    "Qwen3VLConfig": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "PerceiverConfig": {"image_size": 64, "num_latents": 16, "d_latents": 64, "d_model": 64, "num_self_attends_per_block": 2},
    "Siglip2Config": {"vision_config": {"num_patches": 64}},
    "Siglip2VisionConfig": {"num_patches": 64},
    "SwinConfig": _SWIN,
    "Swinv2Config": {**_SWIN, "pretrained_window_sizes": [0, 0, 0, 0]},
    "ViltForImagesAndTextClassification": {"num_images": 2, "modality_type_vocab_size": 3},
    "VipLlavaConfig": {"vision_feature_layers": [-1, -2]},
    "VitMatteConfig": {"backbone_config": {"patch_size": 16}},
    "VivitConfig": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 127, **_LETTERS}, "vq_config": _CODED},
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "DFineConfig": _LEVELS,
    "DeepseekOcr2Config": {"vision_config": {"sam_config": _SAM_TOWER}},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "Deimv2Config": _LEVELS,
    "DepthProConfig": {
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [64, 64],
        "scaled_images_feature_dims": [64, 64, 64],
        "patch_size": 32,
        "image_model_config": {"image_size": 32},
        "patch_model_config": {"image_size": 32},
    },
    "Emu3Config": {
        "vocabulary_map": {"<image>": 96, "<|extra_200|>": 97, **_NUMBERED},
        "vq_config": {**_CODED, "hidden_size": 32},
    },
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {"mrope_section": [3, 3, 2]}},  # rows and columns alternate
    "Exaone4_5_VisionConfig": _WINDOWS,
    "FastVlmConfig": {
        "vision_config": {
            "architecture": "fastvit_mci0",
            "hidden_size": 128,
            "model_args": {"layers": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 64], "inference_mode": True},
        }
    },
    "Gemma3nConfig": {
        "vision_config": {"architecture": "test_efficientnet", "hidden_size": 256},
        "vision_soft_tokens_per_image": 4,
        "audio_config": {"sscp_conv_channel_size": [16, 8]},
    },
    "Gemma4Config": {"vision_config": _GEMMA_VISION},
    "Gemma4UnifiedConfig": {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 8,
            "mm_embed_dim": 64,
            "output_proj_dims": 64,
        }
    },
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2", **_TILES},
    "HGNetV2Config": _CONVOLUTIONAL,
    "HunYuanVLTextConfig": {"head_dim": 16},
    "Kimi_K25VisionConfig": {"pos_emb_height": 8, "pos_emb_width": 8},
    "LlavaNextVideoConfig": _TILES,
    "LwDetrConfig": {"projector_scale_factors": [1.0]},
    "MiniCPMOcrConfig": _MERGING,
    "MiniCPMV4_6Config": _MERGING,
    "MiniCPMV4_7Config": _MERGING,
    "MistralLarge4TextConfig": {"kv_source_layers": [0, 1]},
    "Molmo2Config": {"image_token_id": 124, "vision_config": {"num_position_embeddings": 64}},
    "MuseGlimmerConfig": {"out_hidden_size": 256, "vision_config": _WINDOWS_BY_TYPE},  # four patches of 64
    "OmDetTurboConfig": {
        "apply_layernorm_after_vision_backbone": False,
        "backbone_config": {"backbone": "test_convnext", "img_size": None, "always_partition": None},
        "encoder_in_channels": [32, 48, 64],
        "vision_features_channels": [256, 256, 256],
        "encoder_dim_feedforward": 128,
        "d_model": 256,
        "decoder_hidden_dim": 256,
        "text_projection_out_dim": 48,
        "text_config": {"hidden_size": 48},
        "text_projection_in_dim": 48,
        "class_embed_dim": 48,  # must not be the decoder's width
    },
    "PaddleOCRTextConfig": {"rope_parameters": {"mrope_section": [4, 2, 2]}},
    "PeVideoEncoderConfig": {
        "vision_config": {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": _TOWER, "num_classes": 32}
    },
    "PerceptionLMConfig": {
        "vision_config": {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": {**_TOWER, "global_pool": ""}}
    },
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 97, "vision_end_token_id": 98},
    "Qwen2_5OmniVisionEncoderConfig": _WINDOWS,
    "Qwen2_5_VLVisionConfig": _WINDOWS,
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
        "output_gate_type": "sigmoid", "hc_lowrank": 16,
    },
    "RTDetrConfig": _LEVELS,
    "RTDetrV2Config": _LEVELS,
    "ReformerConfig": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 4]},
    "Sam2HieraDetConfig": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "blocks_per_stage": [1, 2, 2, 2],
        "window_size_per_stage": [4, 2, 2, 2],
        "global_attention_blocks": [4],
    },
    "Sam2VisionConfig": {"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "Sam2Config": {"prompt_encoder_config": {"patch_size": 16}},
    "SamVisionConfig": {"output_channels": 64, "window_size": 4, "num_pos_feats": 32},
    "Sapiens2Config": {"num_key_value_heads_per_layer": [4, 2]},
    "SegGptConfig": {"intermediate_hidden_state_indices": [0, 1], "merge_index": 0, "image_size": [64, 32]},
    "Step3p7Config": {"text_config": {"sliding_window": 64}},
    "T5Gemma2EncoderConfig": {"mm_tokens_per_image": 16},
    "UnlimitedOcrConfig": {"vision_config": {"sam_config": _SAM_TOWER}},
    "ZoeDepthConfig": {"bottleneck_features": 64},
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
