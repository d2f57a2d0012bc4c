"""Example inputs of models that users configure: sizes, ids and parts that the zoo's own small models do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo.examples import example_inputs

TEXT = {
    "vocab_size": 1000,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "image_size": 70,
    "patch_size": 14,
}
QUESTION = {**TEXT, "encoder_hidden_size": 48, "cross_attention_frequency": 1}
PINPOINTS = [[70, 140], [140, 70], [140, 140]]


def _merged_by_three(library: Any) -> Any:
    vision = {"depth": 1, "embed_dim": 48, "hidden_size": 48, "num_heads": 3, "patch_size": 14, "spatial_merge_size": 3}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    text = {**TEXT, "rope_parameters": rope}
    ids = {"image_token_id": 900, "video_token_id": 901, "vision_start_token_id": 902, "vision_end_token_id": 903}
    return library.Qwen2VLForConditionalGeneration(library.Qwen2VLConfig(text_config=text, vision_config=vision, **ids))


def _asked_and_written(library: Any) -> Any:
    words = {"vocab_size": 1000, "d_model": 48, "num_layers": 1, "num_heads": 4, "d_kv": 12, "d_ff": 64}
    return library.Blip2ForConditionalGeneration(
        library.Blip2Config(
            vision_config=VISION,
            qformer_config=QUESTION,
            text_config={"model_type": "t5", **words},
            num_query_tokens=7,
            image_token_index=777,
        )
    )


def _tiled(library: Any) -> Any:
    return library.LlavaNextForConditionalGeneration(
        library.LlavaNextConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_index=555,
            image_grid_pinpoints=PINPOINTS,
        )
    )


def _joint(library: Any) -> Any:
    shared = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return library.FlavaModel(
        library.FlavaConfig(
            image_config=VISION, text_config=TEXT, multimodal_config=shared, hidden_size=48, projection_dim=40
        )
    )


def _wrapped(library: Any) -> Any:
    inner = library.PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 12, **TEXT},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=800,
        projection_dim=48,
    )
    return library.ColPaliForRetrieval(library.ColPaliConfig(vlm_config=inner, embedding_dim=24))


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (_merged_by_three, {"pixel_values": (72, 1176), "input_ids": (2, 4 + 16)}),
        (_asked_and_written, {"input_ids": (2, 7 + 16), "decoder_input_ids": (2, 8)}),
        (_tiled, {"pixel_values": (2, 3, 3, 70, 70)}),
        (_joint, {"pixel_values": (2, 3, 70, 70)}),
        (_wrapped, {"pixel_values": (2, 3, 70, 70), "input_ids": (2, 25 + 16)}),
    ],
)
@torch.no_grad()
def test_a_configured_model_runs_on_inputs_made_up_for_it(
    build: Callable[[Any], Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    model = build(pytest.importorskip("transformers")).eval()
    inputs = example_inputs(model)
    assert {name: tuple(inputs[name].shape) for name in shapes} == shapes
    model(**inputs)
