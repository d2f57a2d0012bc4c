"""Small BLIP models of one image, inputs for them, and transformers' models of the same sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.blip.caption import BlipCaption
from zoo.blip.config import BlipConfig, TextConfig, VisionConfig
from zoo.blip.retrieval import BlipRetrieval
from zoo.blip.vqa import BlipVqa

PAD, WORDS, BEGIN, END, ENCODE = 0, 40, 41, 42, 43
SMALL = BlipConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=24, depth=2, heads=2, mlp_width=48),
    text=TextConfig(vocabulary=44, positions=40, width=16, depth=2, heads=2, mlp_width=32),
    embedding=12,
    encode_id=ENCODE,
    decode_id=BEGIN,
    end_id=END,
    class_id=1,
)
TASKS: dict[str, type[nn.Module]] = {"retrieval": BlipRetrieval, "caption": BlipCaption, "vqa": BlipVqa}


def small(task: str, config: BlipConfig = SMALL, seed: int = 0, strength: float = 4.0) -> Any:
    """A model in eval mode; weights large enough that tokens and words differ."""
    torch.manual_seed(seed)
    model = TASKS[task](config).eval()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.dim() > 1}.values():
            parameter.mul_(strength)
    return model


def texts(batch: int, length: int, first: int) -> tuple[Tensor, Tensor]:
    """Ids [B, T] that start with `first`, and their mask; the second text is two tokens shorter."""
    ids = torch.randint(1, WORDS, (batch, length))
    mask = torch.ones_like(ids)
    ids[:, 0] = first
    ids[1:2, -2:], mask[1:2, -2:] = PAD, 0
    return ids, mask


def inputs(task: str, batch: int = 3, length: int = 7, config: BlipConfig = SMALL) -> dict[str, Tensor]:
    """A batch for a model of the task."""
    first = {"retrieval": 1, "caption": BEGIN, "vqa": ENCODE}[task]
    ids, mask = texts(batch, length, first)
    side = config.vision.image_size
    made = {"images": torch.randn(batch, 3, side, side), "input_ids": ids, "attention_mask": mask}
    if task == "vqa":
        made["answer_ids"], made["answer_mask"] = texts(batch, 4, BEGIN)
    return made


def transformers_model(task: str, config: BlipConfig = SMALL) -> Any:
    """transformers' model of the task, of the same sizes, in eval mode."""
    import transformers

    vision, text = config.vision, config.text
    sizes = transformers.BlipConfig(
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "encoder_hidden_size": text.width if task == "vqa" else vision.width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "intermediate_size": text.mlp_width,
            "max_position_embeddings": text.positions,
            "bos_token_id": BEGIN,
            "sep_token_id": END,
            "eos_token_id": END,
            "pad_token_id": PAD,
            "is_decoder": True,
        },
        image_text_hidden_size=config.embedding,
    )
    kind = {
        "retrieval": transformers.BlipForImageTextRetrieval,
        "caption": transformers.BlipForConditionalGeneration,
        "vqa": transformers.BlipForQuestionAnswering,
    }[task]
    torch.manual_seed(1)
    model = kind(sizes).eval()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.dim() > 1}.values():
            parameter.mul_(4)
    return model
