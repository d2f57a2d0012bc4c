"""Readers of pruned models: folders of ``madtp.save``, and those of a host's ``save_pretrained``. See :data:`READERS`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import madtp
from madtp.errors import MadtpError
from madtp.pruned import PrunedModel
from madtp.saving.host_folder import describing

from .reading import Case, Reader, expect

MOST_REMEMBERED = 64


def host() -> nn.Module:
    """A vision transformer of one block over 16 patches, with the same weights at every call."""
    torch.manual_seed(3)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@dataclass
class Rewrites:
    """``madtp.rewrite`` of one model, each with other arguments once, since nearly all of its time is capture."""

    known: dict[str, PrunedModel | MadtpError] = field(default_factory=dict)
    rewrite: Callable[..., PrunedModel] = madtp.rewrite

    def __call__(self, model: nn.Module, inputs: Any = None, *, config: Any = None, plan: Any = None) -> PrunedModel:
        key = repr((_plain(inputs), config, plan))
        if key not in self.known:
            if len(self.known) == MOST_REMEMBERED:
                del self.known[next(iter(self.known))]
            try:
                self.known[key] = self.rewrite(model, inputs, config=config, plan=plan)
            except MadtpError as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, MadtpError):
            raise found.with_traceback(None)
        found.madtp.control.static_counts.clear()
        found.madtp.control.static_room.clear()
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), list(value.shape), value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (tuple, list)) else value


@dataclass
class _Loading:
    """Loads into one model, and compares with the one that was saved."""

    model: nn.Module
    saved: dict[str, Tensor]
    rewrites: Rewrites = field(default_factory=Rewrites)

    def load(self, folder: Path) -> PrunedModel:
        with mock.patch("madtp.api.rewrite", self.rewrites):
            return madtp.load(folder, self.model)

    def check(self, pruned: PrunedModel, sealed: bool) -> None:
        expect(isinstance(pruned, PrunedModel), f"it is a {type(pruned).__name__}")
        own = pruned.state_dict()
        expect(own.keys() == self.saved.keys(), "it has other tensors than the model that was saved")
        if not sealed:
            changed = [name for name, value in own.items() if not torch.equal(value, self.saved[name])]
            expect(not changed, f"{changed[:3]} differ from what was saved, and no hash told")
        if pruned.madtp.config.batching != "static":
            with torch.no_grad():
                expect(pruned(images()).shape == (2, 3), "its output has another shape")


def _saved() -> tuple[PrunedModel, dict[str, Tensor]]:
    pruned = madtp.rewrite(host(), (images(),), config=madtp.PruningConfig(alignment_tokens=4, min_tokens=2))
    return pruned, {name: value.clone() for name, value in pruned.state_dict().items()}


def _model_folder(folder: Path) -> Case:
    pruned, saved = _saved()
    madtp.save(pruned, folder)
    loading = _Loading(host(), saved)
    (tensors,) = (path.name for path in folder.glob("model-*.safetensors"))
    return Case(
        (("config.json", "json"), (tensors, "safetensors")),
        loading.load,
        loading.check,
        loading.model.state_dict,
        lambda place: _seal(place / "config.json", place / tensors),
    )


def _seal(config: Path, tensors: Path) -> None:
    content = json.loads(config.read_text())
    data = tensors.read_bytes()
    content["tensors"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    config.write_text(json.dumps(content))


def _host_folder(folder: Path) -> Case:
    pruned, saved = _saved()
    with describing(pruned, folder):
        save_file({name: value.contiguous() for name, value in saved.items()}, folder / "model.safetensors")
    loading = _Loading(host(), saved)
    return Case(
        (("madtp.json", "json"), ("model.safetensors", "safetensors")),
        loading.load,
        lambda pruned, sealed: loading.check(pruned, True),  # such folders hold no hash
        loading.model.state_dict,
    )


READERS = (
    Reader("pruned_model", "a folder of madtp.save, by madtp.load", _model_folder),
    Reader("pruned_host", "a folder of save_pretrained of a pruned model, by madtp.load", _host_folder),
)
