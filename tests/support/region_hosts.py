"""Hosts whose own Python stays in charge, for the tests of regions; start at :class:`Captioner` and :class:`Selector`."""

from __future__ import annotations

import torch
from model_case import PATCH, VOCABULARY, WIDTH, Tensors, lively, text
from torch import Tensor, nn
from two_towers import Tower


class Patches(nn.Module):
    """Pixels [B, 3, H, W] to tokens [B, N, C] behind a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 17, WIDTH))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.convolution(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.tower = Tower(batch_first=True, norm_first=True)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(self.patches(pixels))


class Selector(nn.Module):
    """Data-dependent Python between two towers: the text is cut to its longest sample, and masked only if one is shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Vision()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.text = Tower(batch_first=True, norm_first=False)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensors:
        longest = int(attention_mask.sum(1).max().item())
        image = self.vision(pixels)
        padding = attention_mask[:, :longest] == 0
        words = self.text(self.words(input_ids[:, :longest]), padding if padding.any() else None)[:, 0]
        return {"image": image, "text": words, "score": nn.functional.cosine_similarity(image[:, 0], words)}


def selector() -> tuple[Selector, Tensors]:
    return lively(Selector()), {"pixels": torch.randn(3, 3, 32, 32), **text(3, 7)}


class Memory:
    """Keys and values of earlier calls, by layer; an object that no capture knows."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.seen:
            key, value = (torch.cat(pair, 2) for pair in zip(self.seen[layer], (key, value), strict=True))
        self.seen[layer] = key, value
        return key, value


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the image, feed-forward."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.cross = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, image: Tensor, memory: Memory | None = None) -> Tensor:
        y = self.norms[0](x)
        query, key, value = (heads(layer(y)) for layer in self.own[:3])
        if memory is not None:
            key, value = memory.extend(self.layer, key, value)
        first = memory is None or key.shape[2] == query.shape[2]
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=first)
        x = x + self.own[3](seen.transpose(1, 2).flatten(2))
        query = heads(self.cross[0](self.norms[1](x)))
        key, value = (heads(layer(image)) for layer in self.cross[1:3])
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.cross[3](seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[2](x))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, -1)).transpose(1, 2)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(DecoderBlock(layer) for layer in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, image: Tensor, memory: Memory | None = None) -> Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x, image, memory)
        return self.head(x)


class Captioner(nn.Module):
    """Tells an image in words; Python drives the decoder, which remembers keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Vision()
        self.decoder = Decoder()

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        return self.decoder(input_ids, self.vision(pixels))

    @torch.no_grad()
    def generate(self, pixels: Tensor, steps: int = 5) -> Tensor:
        image, memory = self.vision(pixels), Memory()
        said = torch.ones(len(pixels), 1, dtype=torch.long)
        for _ in range(steps):
            logits = self.decoder(said[:, -1:], image, memory)
            said = torch.cat([said, logits[:, -1:].argmax(-1)], 1)
        return said


def captioner() -> tuple[Captioner, Tensors]:
    return lively(Captioner()), {"pixels": torch.randn(3, 3, 32, 32), "input_ids": text(3, 6)["input_ids"]}


class Collector(Selector):
    """Can return what its image layers compute, by hooks on the inside of a tower."""

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, inner: bool = False) -> Tensors:
        layers: list[Tensor] = []
        hooks = [b.register_forward_hook(lambda m, a, y: layers.append(y)) for b in self.vision.tower.encoder.layers]
        found = super().forward(pixels, input_ids, attention_mask)
        for hook in hooks:
            hook.remove()
        return {**found, **{f"layer{i}": y for i, y in enumerate(layers)}} if inner else found
