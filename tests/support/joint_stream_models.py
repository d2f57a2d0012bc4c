"""Hand-written models whose streams hold tokens of several modalities, or whose heads read every token."""

from __future__ import annotations

import torch
from model_case import PATCH, VOCABULARY, WIDTH, Tensors
from torch import Tensor, nn


class Patches(nn.Module):
    """Pixels [B, 3, 32, 32] to 16 patches behind a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions


class Words(nn.Module):
    """Token ids [B, T] to embeddings with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(40, WIDTH) * 0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids) + self.positions[: input_ids.shape[1]]


class Block(nn.Module):
    """A pre-norm block of self-attention and feed-forward; ``mask`` [B, 1, N or 1, N] is True where keys may be seen."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, count, width))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Blocks and a norm."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class SingleStream(nn.Module):
    """Text and image in one sequence from the start; reads the first text token, the image's class token and both parts."""

    def __init__(self, image_first: bool = False) -> None:
        super().__init__()
        self.image_first = image_first
        self.image, self.text = Patches(), Words()
        self.types = nn.Embedding(2, WIDTH)
        self.encoder = Encoder(3)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensors:
        text = self.text(input_ids) + self.types.weight[0]
        image = self.image(pixels) + self.types.weight[1]
        seen = torch.ones(image.shape[:2], dtype=attention_mask.dtype)
        parts, masks = [text, image], [attention_mask, seen]
        if self.image_first:
            parts, masks = parts[::-1], masks[::-1]
        mask = torch.cat(masks, 1)[:, None, None, :].bool()
        x = self.encoder(torch.cat(parts, 1), mask)
        border = 17 if self.image_first else input_ids.shape[1]
        first, second = x[:, :border], x[:, border:]
        image, text = (first, second) if self.image_first else (second, first)
        return {"text": text[:, 0], "image": image[:, 0], "words": text, "patches": image}


class Fusion(nn.Module):
    """Two towers whose tokens are concatenated for a third encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Patches(), Words()
        self.image_encoder, self.text_encoder = Encoder(2), Encoder(2)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.fusion = Encoder(2)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensors:
        mask = attention_mask.bool()
        image = self.project(self.image_encoder(self.image(pixels)))
        text = self.text_encoder(self.text(input_ids), mask[:, None, None, :])
        both = torch.cat([torch.ones(image.shape[:2], dtype=torch.bool), mask], 1)
        x = self.fusion(torch.cat([image, text], 1), both[:, None, None, :])
        return {"read": x[:, 0], "tokens": x, "patches": image}


class Segmenter(nn.Module):
    """A convolutional head on the patch grid of two levels, the deeper one through a narrower decoder block."""

    def __init__(self) -> None:
        super().__init__()
        self.image = Patches()
        self.lower, self.upper = Encoder(2), Encoder(1)
        self.reduce = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(2))
        self.decoder = Block(8)
        self.head = nn.ConvTranspose2d(8, 2, 2, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        low = self.lower(self.image(pixels))
        x = self.decoder(self.reduce[0](self.upper(low))) + self.reduce[1](low)
        grid = x[:, 1:].permute(0, 2, 1).reshape(x.shape[0], 8, 4, 4)
        return self.head(grid)


class Windows(nn.Module):
    """Patch grids merged 2 x 2 between two stages: the merge needs every patch, the second stage is a stream of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH // 2, PATCH // 2)
        self.first, self.second = Encoder(2), Encoder(2)
        self.merge = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first(self.patches(pixels).flatten(2).transpose(1, 2))
        batch = x.shape[0]
        x = x.reshape(batch, 4, 2, 4, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(batch, 16, 4 * WIDTH)
        return self.second(self.merge(x)).mean(1)
