"""What stands in for downloads here: a small trained CLIP of transformers' own class, and drawn pictures with captions.

You need nothing of this file: ``from_pretrained``, your processor and your data take its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import zoo
from zoo.clip.checkpoint import TABLES
from zoo.clip.config import MINI
from zoo.tasks.encode_text import clip_texts
from zoo.transforms.images import for_model


def small_clip() -> CLIPModel:
    """Return a CLIP of 6 vision and 4 text layers, width 128, trained on drawn scenes (96x96 pixels, 145 image tokens)."""

    def tower(depth: int, heads: int, width: int) -> dict[str, int]:
        sizes = {"num_hidden_layers": depth, "num_attention_heads": heads, "hidden_size": width}
        return {**sizes, "intermediate_size": 4 * width, "projection_dim": MINI.embedding}

    vision, text = (tower(one.depth, one.heads, one.width) for one in (MINI.vision, MINI.text))
    config = CLIPConfig(
        vision_config={**vision, "image_size": MINI.image_size, "patch_size": MINI.patch_size},
        text_config={
            **text,
            "vocab_size": MINI.vocabulary,
            "max_position_embeddings": MINI.positions,
            "bos_token_id": 1,
            "eos_token_id": MINI.vocabulary - 1,
            "pad_token_id": 0,
        },
        projection_dim=MINI.embedding,
    )
    model = CLIPModel(config).eval()
    model.load_state_dict(_in_names_of_transformers(zoo.create("clip_mini", checkpoint="dense").state_dict()))
    return model


def captioned_pictures(split: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    """Return ``count`` pictures with a caption each, as ``CLIPProcessor`` would: ``pixel_values`` and ``input_ids``."""
    data = zoo.data("scenes_captions", split=split, limit=count, seed=seed, transform=for_model("clip_mini"))
    samples = [data[index] for index in range(count)]
    captions = [sample.record.captions[index % 4] for index, sample in enumerate(samples)]
    return {
        "pixel_values": torch.cat([sample.images for sample in samples]),
        "input_ids": clip_texts(MINI, None)(captions),
    }


def _in_names_of_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ``clip_mini``, which have OpenAI's names, as transformers calls them."""
    rows = next(table for table in TABLES if table.name == "transformers").rows
    renamed = {}
    for name, value in weights.items():
        for row in rows:
            found = re.fullmatch(re.escape(row.ours).replace(r"\*", "(.*)"), name)
            if found:
                parts = (value.T if row.transpose else value).chunk(len(row.sources))
                for pattern, part in zip(row.sources, parts, strict=True):
                    renamed[pattern.replace("*", "{}").format(*found.groups())] = part
                break
        else:
            renamed[name] = value
    return renamed
