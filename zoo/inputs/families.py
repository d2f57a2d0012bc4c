"""The adapters that come with the zoo. Importing this module registers them and imports no library.

Start with :data:`TRANSFORMERS`: families with arguments that the common makers (``arguments.py``) do not cover.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from madtp.errors import ExampleInputsError
from zoo.adapters import ExampleInputs, register_adapter
from zoo.inputs.arguments import Maker, attention_mask, decoder_input_ids, input_ids, make_inputs, shapes, sizes
from zoo.inputs.draft import InputsDraft
from zoo.inputs.patches import (
    blocks,
    frames,
    grid_of_blocks,
    ids_after_image,
    ids_of_merged,
    large_patches,
    moving_patches,
    patch_positions,
    patches_by_sample,
    pooled_grid,
    pooled_patches,
    square_patches,
    strip,
    tiles,
)


def configured(makers: Mapping[str, Maker | None]) -> ExampleInputs:
    """Return a function that makes example inputs of a model with a configuration, with makers of its own."""
    return partial(make_inputs, makers=makers)


def _one_image(draft: InputsDraft) -> Tensor:
    """One image a sample, counted: ``[B, 1, C, H, W]``."""
    return draft.images(1)


def _two_images(draft: InputsDraft) -> Tensor:
    """Two images a sample: ``[B, 2, C, H, W]``."""
    return draft.images(2)


def _half(draft: InputsDraft) -> Tensor:
    """The upper or the lower half of a picture: ``[B, C, H / 2, W]``."""
    height, width = draft.image_size
    return draft.normal(draft.channels, height // 2, width)


def _flat_patches(draft: InputsDraft) -> Tensor:
    """Flattened patches ``[B, N, P * P * C]``."""
    (height, width), (rows, columns) = draft.image_size, draft.patch_size
    return draft.normal((height // rows) * (width // columns), rows * columns * draft.channels)


def _ranks(draft: InputsDraft) -> Tensor:
    """The order in which patches are hidden, so that every call hides the same: ``[B, N]``."""
    (height, width), (rows, columns) = draft.image_size, draft.patch_size
    return torch.rand(draft.batch, (height // rows) * (width // columns), generator=draft.generator)


def _ids_after_queries(draft: InputsDraft) -> Tensor | None:
    """Ids after one slot for each query token: ``[B, T]``."""
    return ids_after_image(draft, int(draft.config.num_query_tokens))


def _ids_after_clip_queries(draft: InputsDraft) -> Tensor | None:
    """Ids after one slot for each query token of each frame: ``[B, T]``."""
    token = int(draft.config.video_token_index)
    return ids_after_image(draft, int(draft.config.num_query_tokens) * draft.made["pixel_values"].shape[1], token)


def _ids_to_write(draft: InputsDraft) -> Tensor | None:
    """Ids for the decoder where the language model has one."""
    return None if draft.config.use_decoder_only_language_model else decoder_input_ids(draft)


def _choices(draft: InputsDraft) -> Tensor | None:
    """Two texts a sample: ``[B, 2, T]``."""
    ids = input_ids(draft)
    return None if ids is None else torch.stack([ids, ids.flip(0)], dim=1)


def _choices_mask(draft: InputsDraft) -> Tensor:
    mask = torch.ones_like(draft.made["input_ids"])
    mask[-1, 0, -4:] = mask[0, 1, -4:] = 0
    return mask


def _two(maker_shape: tuple[int, ...], field: str | None = None) -> Maker:
    """One thing for each of two choices, of the width that the configuration calls ``field``."""

    def make(draft: InputsDraft) -> Tensor:
        if field is None:
            return torch.ones(draft.batch, 2, *maker_shape, dtype=torch.long)
        return draft.normal(2, *maker_shape, int(getattr(draft.config, field)))

    return make


def _kosmos_ids(draft: InputsDraft) -> Tensor | None:
    draft.image_tokens = int(draft.config.latent_query_num)
    places = draft.words(draft.image_tokens)
    ids = input_ids(draft)
    return None if ids is None else torch.cat([places, ids], dim=1)


def _kosmos_image_mask(draft: InputsDraft) -> Tensor:
    places = torch.zeros_like(draft.made["input_ids"], dtype=torch.bool)
    places[:, : draft.image_tokens] = True
    return places


def _pix2struct_patches(draft: InputsDraft) -> Tensor:
    """Patches behind their row and column: ``[B, 16, 2 + what a patch holds]``."""
    rows = torch.arange(1, 5).repeat_interleave(4)
    places = torch.stack([rows, torch.arange(1, 5).repeat(4)], dim=-1).expand(draft.batch, -1, -1).float()
    return torch.cat([places, draft.normal(16, int(draft.vision.patch_embed_hidden_size))], dim=-1)


def _all_prefix(draft: InputsDraft) -> Tensor:
    """No token is of the part that is predicted: ``[B, T]``."""
    return torch.zeros_like(draft.made["input_ids"])


def _over_patches(draft: InputsDraft) -> Tensor:
    return torch.ones(draft.batch, 16, dtype=torch.long)


def _one_tile(draft: InputsDraft) -> Tensor:
    """One image of the most tiles a sample: ``[B, 1, tiles, C, H, W]``."""
    return draft.images(1, int(draft.vision.max_num_tiles))


def _tile_mask(draft: InputsDraft) -> Tensor:
    return torch.ones(draft.batch, 1, int(draft.vision.max_num_tiles), dtype=torch.long)


def _tile_attention(draft: InputsDraft) -> Tensor | None:
    if "pixel_values" not in draft.made:
        return None
    length = draft.made["input_ids"].shape[1]
    return torch.ones(draft.batch, length, 1, int(draft.vision.max_num_tiles), dtype=torch.long)


def _ids_after_patches(draft: InputsDraft) -> Tensor | None:
    """Ids after one slot for each patch, for models that take patches by another name: ``[B, T]``."""
    (height, width), (rows, columns) = draft.image_size, draft.patch_size
    return ids_after_image(draft, (height // rows) * (width // columns))


def _every_tile(draft: InputsDraft) -> Tensor:
    """Every tile is part of the image: ``[B, tiles]``."""
    return torch.ones(draft.made["pixel_values"].shape[:2], dtype=torch.bool)


def _overview(draft: InputsDraft) -> Tensor:
    """Images so large that the smallest copy of them is still one patch: ``[B, C, H, W]``."""
    side = int(draft.config.patch_size / min(draft.config.scaled_images_ratios))
    return draft.normal(3, side, side)


def _image_attention(draft: InputsDraft) -> Tensor:
    return torch.ones(draft.batch, draft.made["input_ids"].shape[1], 1, dtype=torch.long)


def _characters(draft: InputsDraft) -> Tensor:
    return draft.integers(1, 1000, 16)


_COUNTED = {"pixel_values": _one_image, "pixel_mask": None}
_TILED = {"pixel_values": tiles}
_QUERIES = {"input_ids": _ids_after_queries, "decoder_input_ids": _ids_to_write}
_QUESTIONS: Mapping[str, Maker | None] = {
    "qformer_input_ids": lambda draft: draft.words(8),
    "qformer_attention_mask": lambda draft: torch.ones(draft.batch, 8, dtype=torch.long),
}
_QFORMER: Mapping[str, Maker | None] = {
    "query_embeds": lambda draft: draft.normal(4, int(draft.config.hidden_size)),
    "encoder_hidden_states": lambda draft: draft.normal(16, int(draft.config.encoder_hidden_size)),
    "attention_mask": None,
}
_PLACED = {"pixel_values": patches_by_sample, "image_position_ids": patch_positions}
_SQUARES = {"pixel_values": square_patches}
_STRIPS: Mapping[str, Maker | None] = {"pixel_values": strip, "target_sizes": shapes}

TRANSFORMERS: dict[str, Mapping[str, Maker | None]] = {
    "bart.modeling_bart.BartForSequenceClassification": {"decoder_input_ids": None},
    "bert.modeling_bert.BertForMultipleChoice": {"input_ids": _choices, "attention_mask": _choices_mask},
    "blip_2": _QUERIES,
    "blip_2.modeling_blip_2.Blip2ForImageTextRetrieval": {"decoder_input_ids": None},
    "blip_2.modeling_blip_2.Blip2QFormerModel": _QFORMER,
    "blip_2.modeling_blip_2.Blip2TextModelWithProjection": {},
    "canine": {"input_ids": _characters, "attention_mask": attention_mask},
    "flava.modeling_flava.FlavaForPreTraining": {
        "codebook_pixel_values": lambda draft: torch.rand(draft.batch, 3, 64, 64, generator=draft.generator),
        "bool_masked_pos": lambda draft: draft.integers(0, 2, 8, 8).bool(),
        "input_ids_masked": lambda draft: draft.made["input_ids"],
    },
    "colmodernvbert": _COUNTED,
    "colqwen2": {"pixel_values": patches_by_sample, "input_ids": ids_of_merged},
    "depth_pro": {"pixel_values": _overview},
    "fuyu": {"image_patches": _flat_patches, "pixel_values": None, "input_ids": _ids_after_patches},
    "gemma4": _PLACED,
    "gemma4_unified": {**_PLACED, "pixel_values": large_patches},
    "granite4_vision": _TILED,
    "granite_docling": {"pixel_values": tiles, "pixel_attention_mask": _every_tile},
    "idefics": {**_COUNTED, "image_attention_mask": _image_attention},
    "idefics2": _COUNTED,
    "idefics3": _COUNTED,
    "inkling": {"pixel_values": moving_patches},
    "inkling2": {"pixel_values": blocks, "image_grid_thw": grid_of_blocks},
    "instructblip": {**_QUERIES, **_QUESTIONS},
    "instructblip.modeling_instructblip.InstructBlipQFormerModel": {
        **_QFORMER,
        "attention_mask": lambda draft: torch.ones(draft.batch, draft.made["input_ids"].shape[1] + 4, dtype=torch.long),
    },
    "instructblipvideo": {**_QUERIES, **_QUESTIONS, "pixel_values": frames, "input_ids": _ids_after_clip_queries},
    "kimi_k25": _SQUARES,
    "kosmos2": {"input_ids": _kosmos_ids, "image_embeds_position_mask": _kosmos_image_mask},
    "llava": {"image_sizes": lambda draft: sizes(draft) if draft.vision.model_type == "pixtral" else None},
    "llava_next": _TILED,
    "llava_next_video": _TILED,
    "llava_onevision": _TILED,
    "minicpm_ocr": _STRIPS,
    "minicpmv4_6": _STRIPS,
    "minicpmv4_7": _STRIPS,
    "mllama": {
        "pixel_values": _one_tile,
        "aspect_ratio_ids": lambda draft: torch.ones(draft.batch, 1, dtype=torch.long),
        "aspect_ratio_mask": _tile_mask,
        "cross_attention_mask": _tile_attention,
    },
    "modernvbert": _COUNTED,
    "molmo2": {
        "pixel_values": _flat_patches,
        "image_token_pooling": pooled_patches,
        "image_grids": pooled_grid,
        "image_num_crops": lambda draft: torch.ones(draft.batch, dtype=torch.long),
    },
    "omdet_turbo": {
        "classes_input_ids": lambda draft: draft.words(6),
        "classes_attention_mask": lambda draft: torch.ones(draft.batch, 6, dtype=torch.long),
        "tasks_input_ids": lambda draft: draft.words(8),
        "tasks_attention_mask": lambda draft: torch.ones(draft.batch, 8, dtype=torch.long),
        "classes_structure": lambda draft: torch.ones(draft.batch, dtype=torch.long),
    },
    "paddleocr_vl": _SQUARES,
    "paligemma": {"token_type_ids": _all_prefix},
    "perception_lm": _COUNTED,
    "pi0": {
        **_COUNTED,
        "pixel_attention_mask": _every_tile,
        "input_ids": lambda draft: draft.words(draft.length),
        "state": lambda draft: draft.normal(int(draft.config.max_state_dim)),
        "noise": lambda draft: draft.normal(int(draft.config.chunk_size), int(draft.config.max_action_dim)),
        "timestep": lambda draft: torch.rand(draft.batch, generator=draft.generator),
    },
    "pix2struct": {"flattened_patches": _pix2struct_patches, "attention_mask": _over_patches},
    "seggpt": dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), _half),
    "smolvlm": _COUNTED,
    "timesformer": {"pixel_values": lambda draft: draft.images(int(draft.config.num_frames))},
    "videoprism": {"pixel_values_videos": lambda draft: draft.images(int(draft.vision.num_frames))},
    "vilt.modeling_vilt.ViltForImagesAndTextClassification": {"pixel_values": _two_images, "pixel_mask": None},
    "visual_bert.modeling_visual_bert.VisualBertForMultipleChoice": {
        "input_ids": _choices,
        "attention_mask": _choices_mask,
        "visual_embeds": _two((36,), "visual_embedding_dim"),
        "visual_attention_mask": _two((36,)),
        "visual_token_type_ids": _two((36,)),
    },
    "vit_mae": {"noise": _ranks},
    "vivit": {"pixel_values": lambda draft: draft.images(int(draft.config.num_frames))},
    "vjepa2": {"pixel_values_videos": lambda draft: draft.images(int(draft.config.frames_per_clip))},
    "x_clip": {"pixel_values": frames},
}


def _timm(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
    size = list(getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224)))
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built, tuple):  # the size that this model was built for, where it differs from the published one
        size[1:] = built
    return {"x": torch.randn(batch, *size, generator=generator)}


def _open_clip(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
    towers: Any = model
    text_tower = getattr(towers, "text", towers)
    size = towers.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    vocabulary = int(getattr(towers, "vocab_size", None) or text_tower.vocab_size)
    length = int(getattr(towers, "context_length", None) or getattr(text_tower, "context_length", None) or 16)
    if hasattr(text_tower, "config"):  # a tower of transformers takes texts of any length
        length = min(16, length)
    text = torch.randint(5, vocabulary - 2, (batch, length), generator=generator)
    text[:, 0] = vocabulary - 2
    text[:-1, -1] = text[-1, -5] = vocabulary - 1
    text[-1, -4:] = int(getattr(text_tower, "pad_id", None) or 0)
    return {"image": torch.randn(batch, 3, height, width, generator=generator), "text": text}


def _blip_nlvr(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
    config: Any = model.config
    side, text = config.vision.image_size, config.text
    length = min(16, text.positions)
    return {
        "images": torch.randn(batch, 2, 3, side, side, generator=generator),
        "input_ids": torch.randint(1, text.vocabulary, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def _blip(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """An image and a text each; the last text is padded."""
    config: Any = model.config
    side, text = config.vision.image_size, config.text
    length = min(16, text.positions)
    ids = torch.randint(1, text.vocabulary, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    ids[-1, -4:], mask[-1, -4:] = text.pad_id, 0
    return {
        "images": torch.randn(batch, 3, side, side, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
    }


def _blip_vqa(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """A question and an answer for each image."""
    made = _blip(model, batch, generator)
    return {**made, "answer_ids": made["input_ids"][:, :5], "answer_mask": torch.ones(batch, 5, dtype=torch.long)}


def _clip_pairs(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """An image and a text each; the last text ends earlier."""
    config: Any = model.config
    length = min(16, config.positions)
    ids = torch.randint(1, config.vocabulary - 1, (batch, length), generator=generator)
    ids[:-1, -1] = ids[-1, -5] = config.vocabulary - 1
    ids[-1, -4:] = 0
    return {
        "images": torch.randn(batch, 3, config.image_size, config.image_size, generator=generator),
        "input_ids": ids,
    }


def _unknown(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
    raise ExampleInputsError(f"the zoo has no example inputs for {type(model).__name__}; pass example_inputs.")


register_adapter("zoo", _unknown)
register_adapter("zoo.blip.nlvr.BlipNlvr", _blip_nlvr)
for _task in ("retrieval.BlipRetrieval", "caption.BlipCaption"):
    register_adapter(f"zoo.blip.{_task}", _blip)
# The answer attends to all states of the question alike; the first is its class token all the same.
_QUESTION = {"text": (0,)}
register_adapter("zoo.blip.vqa.BlipVqa", _blip_vqa, protect=_QUESTION)
register_adapter("zoo.objectives.multi_text.ManyQuestions", _unknown, protect=_QUESTION)
register_adapter("zoo.clip.model.Clip", _clip_pairs)
register_adapter("timm", _timm)
register_adapter("open_clip", _open_clip)
register_adapter("transformers", make_inputs)
register_adapter("transformers.models.blip.modeling_blip.BlipForQuestionAnswering", make_inputs, protect=_QUESTION)
for _family, _makers in TRANSFORMERS.items():
    register_adapter(f"transformers.models.{_family}", configured(_makers))
