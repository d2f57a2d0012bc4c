"""Decoder-only models that read an image among their words and remember keys and values; start at :class:`Reader`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from model_case import VOCABULARY, WIDTH, Tensors, lively
from region_hosts import Memory, Patches, heads
from torch import Tensor, nn

IMAGE = 7
LAYERS = 3


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions of ``x [B, H, N, D]``; ``positions [B, N]``."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * torch.arange(1, half + 1) / half
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


class ReaderBlock(nn.Module):
    """Self-attention over what was read so far, feed-forward."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, memory: Memory | None) -> Tensor:
        query, key, value = (heads(layer(self.norms[0](x))) for layer in self.own[:3])
        query, key = rotate(query, positions), rotate(key, positions)
        if memory is not None:
            key, value = memory.extend(self.layer, key, value)
        seen = self.attend(query, key, value, mask)
        x = x + self.own[3](seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask)


class EinsumBlock(ReaderBlock):
    """Attention as a sum over indices."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, -1e9).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, value)


class Body(nn.Module):
    """Writes image tokens among embedded words and decodes them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(ReaderBlock(layer) for layer in range(LAYERS))

    def forward(
        self, pixels: Tensor | None, input_ids: Tensor, attention_mask: Tensor, memory: Memory | None = None
    ) -> Tensor:
        x = self.words(input_ids)
        if pixels is not None:
            places = (input_ids == IMAGE)[:, :, None].expand_as(x)
            x = x.masked_scatter(places, self.patches(pixels)[:, 1:])
        length = attention_mask.shape[1]
        places = torch.arange(length - input_ids.shape[1], length)
        positions = attention_mask.cumsum(1)[:, -input_ids.shape[1] :]
        mask = (places[:, None] >= torch.arange(length)) & (attention_mask > 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, positions, mask, memory)
        return x


class Reader(nn.Module):
    """Goes on from an image and words."""

    def __init__(self, body: type[Body] = Body) -> None:
        super().__init__()
        self.body = body()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self, pixels: Tensor | None, input_ids: Tensor, attention_mask: Tensor, memory: Memory | None = None
    ) -> Tensor:
        return self.head(self.body(pixels, input_ids, attention_mask, memory))

    @torch.no_grad()
    def generate(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, steps: int = 4) -> Tensor:
        memory, said = Memory(), []
        image: Tensor | None = pixels
        for _ in range(steps):
            said.append(self(image, input_ids, attention_mask, memory)[:, -1].argmax(-1, keepdim=True))
            attention_mask = torch.cat([attention_mask, torch.ones_like(said[-1])], 1)
            image, input_ids = None, said[-1]
        return torch.cat(said, 1)


class EinsumBody(Body):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EinsumBlock(layer) for layer in range(LAYERS))


class Handing(Body):
    """Returns keys and values beside the states, in a tuple, a list or a dict."""

    def __init__(self, container: type = tuple, *, causal: bool = True) -> None:
        super().__init__()
        self.container, self.causal = container, causal

    def forward(
        self, pixels: Tensor | None, input_ids: Tensor, attention_mask: Tensor, memory: Memory | None = None
    ) -> object:
        x = self.words(input_ids)
        places = (input_ids == IMAGE)[:, :, None].expand_as(x)
        x = x.masked_scatter(places, self.patches(pixels)[:, 1:])
        length = input_ids.shape[1]
        order = torch.ones(length, length, dtype=torch.bool)
        mask = (order.tril() if self.causal else order) & (attention_mask > 0)[:, None, None, :]
        kept = []
        for block in self.blocks:
            own = Memory()
            x = block(x, attention_mask.cumsum(1), mask, own)
            kept.append(own.seen[block.layer])
        return x, dict(enumerate(kept)) if self.container is dict else self.container(kept)


class Peeking(Body):
    """Decides by values of what it remembers, which no capture can follow."""

    def forward(
        self, pixels: Tensor | None, input_ids: Tensor, attention_mask: Tensor, memory: Memory | None = None
    ) -> Tensor:
        sign = -1 if memory is not None and memory.seen and memory.seen[1][0].mean().item() > 1e9 else 1
        return sign * super().forward(pixels, input_ids, attention_mask, memory)


def reader(body: type[Body] = Body) -> tuple[Reader, Tensors]:
    """A reader and a batch of three: 16 image tokens between words, the second sample padded on the left."""
    torch.manual_seed(0)
    ids = torch.randint(10, VOCABULARY, (3, 24))
    ids[0, 2:18], ids[1, 5:21], ids[2, 1:17] = IMAGE, IMAGE, IMAGE
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return lively(Reader(body)), {"pixels": torch.randn(3, 3, 32, 32), "input_ids": ids, "attention_mask": mask}


@contextmanager
def hiding(dropped: list[Tensor | None]) -> Iterator[None]:
    """Inside the block the attention of each layer sees no key that is ``dropped [B, N]`` there; later keys are visible."""
    plain, calls = nn.functional.scaled_dot_product_attention, [0]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        gone = dropped[calls[0] % len(dropped)]
        calls[0] += 1
        if gone is not None:
            mask = mask & ~nn.functional.pad(gone, (0, key.shape[2] - gone.shape[1]))[:, None, None, :]
        return plain(query, key, value, mask)

    with patch.object(nn.functional, "scaled_dot_product_attention", attend):
        yield
