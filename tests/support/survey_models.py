"""A source of models for tests of the survey: :func:`build`, as the runner calls it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from cached_decoders import ReaderBlock
from model_case import WIDTH
from small_vit import images, vit
from torch import Tensor, nn


class Convolutional(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((-2, -1))


class Uncapturable(nn.Module):
    """Attention behind Python that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).mT[..., :1].expand(-1, -1, 8)
        for _ in range(int(images.abs().sum().item()) % 2 + 1):
            tokens = self.layer(tokens, tokens, tokens)[0]
        return tokens.mean(1)


class Doubtful(nn.Module):
    """Two attentions behind Python that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            for _ in range(int(tokens.abs().sum().item()) % 2 + 1):
                tokens = tokens + layer(tokens, tokens, tokens)[0]
        return tokens.mean(1)


class Half(nn.Module):
    """Two towers, one of which cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.doubtful, self.vit = Doubtful(), vit(depth=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"doubtful": self.doubtful(images[:, :1, :8, :8].flatten(1, 2)), "sure": self.vit(images)}


class Coupled(nn.Module):
    """Computes something else for a single sample than for a batch, around a tower."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(depth=2)

    def forward(self, images: Tensor) -> Tensor:
        alone = images.shape[0] == 1 and not torch.compiler.is_exporting()
        return self.vit(images) * (2 if alone else 1)


class Shuffled(nn.Module):
    """Patches in an order drawn anew at every call, by Python that depends on data; returns all tokens and the first."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(depth=2)
        self.vit.head, self.vit.fc_norm = nn.Identity(), nn.Identity()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        count = tokens.shape[1] - 1
        order = torch.multinomial(torch.ones(int((images == images).any().item()) * count), count) + 1
        tokens = self.vit.blocks(torch.cat([tokens[:, :1], tokens[:, order]], 1))
        return {"tokens": tokens, "first": tokens[:, 0]}


class Language(nn.Module):
    """Predicts each position of a causal text, given an optional mood besides the text."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mood = nn.Embedding(30, WIDTH), nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(ReaderBlock(layer) for layer in range(3))

    def forward(self, ids: Tensor, mood: Tensor | None = None) -> Tensor:
        x = self.words(ids)
        if mood is not None:
            x = x + self.mood(mood)[:, None]
        places = torch.arange(ids.shape[1])
        for block in self.blocks:
            x = block(x, places[None], places[:, None] >= places, None)
        return x @ self.words.weight.T


def further_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return no further forms of inputs."""
    return {}


@dataclass(frozen=True)
class Made:
    """A source of one model."""

    model: nn.Module
    inputs: Mapping[str, Any]
    further: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def build(self, name: str) -> tuple[nn.Module, Mapping[str, Any]]:
        return self.model, self.inputs

    def further_inputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return self.further


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of this name and its inputs; some names misbehave."""
    if name == "missing":
        raise LookupError("no such model")
    if name in ("language", "beside"):
        ids = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(0))
        return Language(), {"ids": ids} if name == "language" else {"ids": ids, "mood": torch.randn(2, 4)}
    if name == "endless":
        time.sleep(600)
    if name == "dies":
        os._exit(3)
    if name == "vit":
        return vit(depth=2), {"x": images(2, 0)}
    if name == "shuffled":
        return Shuffled(), {"images": images(2, 0)}
    torch.manual_seed(0)
    return {"conv": Convolutional, "uncapturable": Uncapturable, "half": Half, "coupled": Coupled}[name](), {
        "images": images(2, 0)
    }
