"""Small models of open_clip's configurations: its own towers, towers of timm, text towers of transformers."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from zoo.small import timm as small_timm
from zoo.small.shrink import HEADS, IMAGE, LAYERS, PATCH, VOCABULARY, WIDTH

CONTEXT = 16
_TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
_VISION = {"image_size": IMAGE, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
_TEXT_TOWERS = {
    "xlm-roberta": "XLMRobertaConfig",
    "roberta": "RobertaConfig",
    "mt5": "MT5Config",
    "nllb": "M2M100Config",
}


def has(name: str) -> bool:
    """Whether the installed release has a configuration of that name."""
    import open_clip

    return open_clip.get_model_config(name) is not None


def build(name: str) -> nn.Module:
    """The model of open_clip's configuration of that name, made small."""
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise LookupError(f"open_clip {open_clip.__version__} has no configuration {name!r}.")
    with _text_tower(config["text_cfg"]) as text, _small_timm():
        given = {
            "embed_dim": WIDTH,
            "quick_gelu": config.get("quick_gelu", False),
            "vision_cfg": _vision(config["vision_cfg"]),
            "text_cfg": text,
        }
        for extra in ("init_logit_scale", "init_logit_bias"):
            if extra in config:
                given[extra] = config[extra]
        if "multimodal_cfg" in config:
            given["multimodal_cfg"] = {**config["multimodal_cfg"], **_TEXT, "attn_pooler_heads": HEADS}
            kind = open_clip.CoCa
        else:
            custom = config.get("custom_text") or "hf_model_name" in text
            kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        model: nn.Module = kind(**given)
        return model


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    if "timm_model_name" in config:
        size = small_timm.arguments(config["timm_model_name"]).get("img_size")
        return {**config, "image_size": config["image_size"] if size is None else size}
    if isinstance(config["layers"], list):  # a ResNet
        return {**config, "image_size": IMAGE, "layers": [1, 1, 1, 1], "width": 16}
    pool = {"attn_pooler_heads": HEADS} if "attn_pooler_heads" in config else {}
    return {**config, **_VISION, **pool}


@contextlib.contextmanager
def _text_tower(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The text configuration made small; a tower of transformers is described by a folder, so nothing is downloaded."""
    if "hf_model_name" not in config:
        yield {**config, **_TEXT}
        return
    import transformers

    from zoo.small.hf import small_fields

    published = str(config["hf_model_name"])
    kind = next(value for key, value in _TEXT_TOWERS.items() if key in published)
    with tempfile.TemporaryDirectory() as folder:
        fields = small_fields(getattr(transformers, kind))
        (Path(folder) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        yield {**config, "hf_model_name": folder, "hf_tokenizer_name": folder, "hf_model_pretrained": False}


@contextlib.contextmanager
def _small_timm() -> Iterator[None]:
    """Vision towers of timm come small."""
    import timm

    create = timm.create_model

    def small(name: str, *args: Any, **kwargs: Any) -> Any:
        return create(name, *args, **{**kwargs, **small_timm.arguments(name)})

    with mock.patch.object(timm, "create_model", small):
        yield
