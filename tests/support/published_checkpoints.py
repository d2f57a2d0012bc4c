"""Checkpoints and vocabularies in exactly the published formats, written by tests from models with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.clip.config import ClipConfig

QUEUE = 32
# Places of BERT's special tokens in the vocabulary of bert-base-uncased, and its size.
BERT = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
BERT_SIZE = 30_522


def blip_content(model: nn.Module, task: str) -> dict[str, Tensor]:
    """What a published BLIP file of a task holds: the model's weights, position ids, and the copies of retrieval's training."""
    own = {key: value.clone() for key, value in model.state_dict().items()}
    tower = "text_decoder.bert" if task == "caption" else "text_encoder"
    positions = own[f"{tower}.embeddings.position_embeddings.weight"].shape[0]
    more = {f"{tower}.embeddings.position_ids": torch.arange(positions)[None]}
    if task == "retrieval":
        copied = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
        more |= {key.replace(".", "_m.", 1): value + 1 for key, value in own.items() if key.startswith(copied)}
        width = own["vision_proj.weight"].shape[0]
        more |= {"image_queue": torch.randn(width, QUEUE), "text_queue": torch.randn(width, QUEUE)}
        more |= {"idx_queue": torch.full((1, QUEUE), -100), "ptr_queue": torch.zeros(1, dtype=torch.long)}
    return own | more


def write_blip(path: Path, model: nn.Module, task: str) -> Path:
    """A published file: weights under "model", beside what training left."""
    torch.save({"model": blip_content(model, task), "optimizer": {"state": {}, "param_groups": []}, "epoch": 4}, path)
    return path


def write_openai(path: Path, model: nn.Module, config: ClipConfig) -> Path:
    """A state dict as OpenAI's: half precision, and three sizes."""
    content = {key: value.half() for key, value in model.state_dict().items()}
    sizes = {
        "input_resolution": config.image_size,
        "context_length": config.positions,
        "vocab_size": config.vocabulary,
    }
    torch.save(content | {name: torch.tensor(size) for name, size in sizes.items()}, path)
    return path


def transformers_clip(config: ClipConfig) -> Any:
    """transformers' CLIP model of the same sizes, random."""
    import transformers

    vision, text = config.vision, config.text
    sizes = transformers.CLIPConfig(
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": 4 * vision.width,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
        text_config={
            "hidden_size": text.width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "intermediate_size": 4 * text.width,
            "vocab_size": config.vocabulary,
            "max_position_embeddings": config.positions,
            "bos_token_id": config.vocabulary - 2,
            "eos_token_id": config.vocabulary - 1,
        },
        projection_dim=config.embedding,
    )
    return transformers.CLIPModel(sizes)


def write_vocabulary(path: Path, words: Iterable[str], size: int = BERT_SIZE) -> Path:
    """A `vocab.txt` of so many lines that holds these words; special tokens stand where bert-base-uncased has them."""
    places = BERT if size > max(BERT.values()) + 1 else {token: place for place, token in enumerate(BERT)}
    lines = [f"[unused{number}]" for number in range(size)]
    for token, place in places.items():
        lines[place] = token
    free = [place for place in range(size) if place not in places.values()]
    for place, word in zip(reversed(free), sorted(set(words)), strict=False):
        lines[place] = word
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
