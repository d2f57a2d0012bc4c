"""The zoo's mini models with two blocks a tower, for tests of what surrounds a model.

A rewrite takes time in proportion to the number of operations, hardly to their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from torch import nn

import zoo
from zoo import registry
from zoo.blip import config as blip
from zoo.blip.caption import BlipCaption
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.retrieval import BlipRetrieval
from zoo.blip.vqa import BlipVqa
from zoo.clip import config as clip
from zoo.clip.model import Clip

DEPTH = 2


def _blip(config: blip.BlipConfig) -> blip.BlipConfig:
    return replace(config, vision=replace(config.vision, depth=DEPTH), text=replace(config.text, depth=DEPTH))


def _nlvr(config: blip.NlvrConfig) -> blip.NlvrConfig:
    text = replace(config.text, depth=DEPTH, merge_from_layer=1)
    return replace(config, vision=replace(config.vision, depth=DEPTH), text=text)


def _clip(config: clip.ClipConfig) -> clip.ClipConfig:
    towers = {name: replace(getattr(config, name), depth=DEPTH) for name in ("vision", "text")}
    return replace(config, **towers)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "blip_nlvr": lambda: BlipNlvr(_nlvr(blip.MINI)),
    "blip_retrieval": lambda: BlipRetrieval(_blip(blip.RETRIEVAL_MINI)),
    "blip_caption": lambda: BlipCaption(_blip(blip.CAPTION_MINI)),
    "blip_vqa": lambda: BlipVqa(_blip(blip.BLIP_MINI)),
    "clip": lambda: Clip(_clip(clip.MINI)),
}


def shallow(model: str) -> str:
    """The name of the shallow model of a family: ``clip_shallow`` for ``clip_vit_b16``."""
    family = "clip" if model.startswith("clip") else model.removesuffix("_mini")
    return f"{family}_shallow"


@contextmanager
def shallow_models() -> Iterator[None]:
    """Inside the block the zoo has the shallow models, too."""
    with patch.dict(registry.MODELS._entries):
        for family, build in BUILDERS.items():
            mini = zoo.describe(f"{family}_mini")
            entry = replace(mini, name=f"{family}_shallow", builder=build, shipped=())
            registry.MODELS.add(entry.name, entry)
        yield
