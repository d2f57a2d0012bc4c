"""The BLIP family. `config.py` holds sizes, a file of each task its model, `checkpoint.py` key names.

`nlvr.py` reasons about image pairs (text encoder in `text.py`); `retrieval.py`, `caption.py` and `vqa.py` share `med.py`.
`matching.py` trains and re-ranks retrieval, `decoding.py` writes captions and answers, `losses.py` trains these.
Importing this package registers the models; timm is imported when one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import nn

from zoo.registry import Builder, register

_PAPER = "https://arxiv.org/abs/2201.12086"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


def _published(name: str, description: str, side: int = 384) -> Callable[[Builder], Builder]:
    """Register a size of which weights are published."""
    return register(
        name,
        description=description,
        input_size=(3, side, side),
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
        licence="BSD-3-Clause (published weights)",
        paper=_PAPER,
    )


def _mini(name: str, description: str, checkpoints: tuple[str, ...] = ()) -> Callable[[Builder], Builder]:
    """Register a size that two cores can train."""
    return register(
        name,
        description=f"{description}, small enough to train on two cores; for the scenes data",
        input_size=(3, 96, 96),
        mean=_HALF,
        std=_HALF,
        licence="Apache-2.0",
        paper=_PAPER,
        checkpoints=checkpoints,
    )


def _builder(task: str, model: str, size: str) -> Builder:
    """Builds the class `model` of `zoo.blip.<task>` in the size of that name in `zoo.blip.config`."""

    def build() -> nn.Module:
        config = getattr(import_module("zoo.blip.config"), size)
        built: nn.Module = getattr(import_module(f"zoo.blip.{task}"), model)(config)
        return built

    return build


def _register_task(
    name: str,
    task: str,
    model: str,
    what: str,
    sizes: tuple[str, str, str],
    side: int = 384,
    weights: tuple[str, ...] = (),
) -> None:
    """Base, large and mini of one task."""
    base, large, mini = sizes
    _published(name, f"BLIP base for {what}: ViT-B/16 at {side}, BERT base", side)(_builder(task, model, base))
    _published(f"{name}_large", f"BLIP large for {what}: ViT-L/16 at {side}, BERT base", side)(
        _builder(task, model, large)
    )
    _mini(f"{name}_mini", f"The architecture of {name}", weights)(_builder(task, model, mini))


_RETRIEVAL_SIZES = ("BLIP_BASE", "BLIP_LARGE", "RETRIEVAL_MINI")
_register_task(
    "blip_nlvr",
    "nlvr",
    "BlipNlvr",
    "statements about two images (NLVR2)",
    ("BASE", "LARGE", "MINI"),
    weights=("dense",),
)
_register_task(
    "blip_retrieval", "retrieval", "BlipRetrieval", "image-text retrieval", _RETRIEVAL_SIZES, weights=("dense",)
)
_CAPTION_SIZES = ("BLIP_BASE", "BLIP_LARGE", "CAPTION_MINI")
_register_task("blip_caption", "caption", "BlipCaption", "captions", _CAPTION_SIZES, weights=("dense",))
_VQA_SIZES = ("VQA_BASE", "VQA_LARGE", "BLIP_MINI")
_register_task("blip_vqa", "vqa", "BlipVqa", "questions about an image", _VQA_SIZES, 480, weights=("dense",))
