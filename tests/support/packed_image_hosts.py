"""Hosts whose vision tower takes all images at once, for the tests of images apart; start at :func:`packed`."""

from __future__ import annotations

from typing import Any

import torch
from joint_stream_models import Encoder
from model_case import DEPTH, VOCABULARY, WIDTH, Tensors, lively, text
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS = 12
GRIDS = ((4, 4), (4, 4), (2, 6))


class Attention(nn.Module):
    """Self-attention in a row of images: each sees itself alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), 3, 2, -1).permute(1, 2, 0, 3).unbind(0)
        split = [part.unsqueeze(0).split(lengths.tolist(), 2) for part in (q, k, v)]
        images = [F.scaled_dot_product_attention(*one).transpose(1, 2) for one in zip(*split, strict=True)]
        return self.out(torch.cat(images, 1).reshape(len(x), -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.forward_part = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x + self.attention(self.first(x), lengths)
        return x + self.forward_part(self.second(x))


class Rows(nn.Module):
    """Patches [sum of h * w, P] of images of ``sizes`` [n, 2] to tokens, and to groups of four merged ones."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(PIXELS, WIDTH)
        self.table = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.merger = nn.Linear(4 * WIDTH, WIDTH)

    def positions(self, sizes: Tensor) -> Tensor:
        places = [torch.arange(h)[:, None] * 8 + torch.arange(w)[None] for h, w in sizes.tolist()]
        return self.table(torch.cat([place.flatten() for place in places]))

    def forward(self, rows: Tensor, sizes: Tensor) -> Any:
        x = self.patches(rows) + self.positions(sizes)
        layers = []
        for block in self.blocks:
            x = block(x, sizes.prod(1))
            layers.append(self.merger(x.reshape(-1, 4 * WIDTH)))
        return {"states": x, "merged": layers[-1], "layers": tuple(layers), "nothing": None}


class Mingling(Rows):
    """Images depend on each other: the mean of all is added to each."""

    def forward(self, rows: Tensor, sizes: Tensor) -> Any:
        return super().forward(rows - rows.mean(0), sizes)


class Windows(Rows):
    """Patches go to windows of six, fewer at the end of an image; every other block attends within these alone."""

    def forward(self, rows: Tensor, sizes: Tensor) -> Any:
        columns = [torch.arange(h * w).view(h, w).T.flatten() for h, w in sizes.tolist()]
        starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
        order = torch.cat([places + start for places, start in zip(columns, starts.tolist(), strict=True)])
        lengths = [min(6, count - start) for count in sizes.prod(1).tolist() for start in range(0, count, 6)]
        x = (self.patches(rows) + self.positions(sizes))[order]
        for number, block in enumerate(self.blocks):
            x = block(x, sizes.prod(1) if number % 2 else torch.tensor(lengths))
        x = x[order.argsort()]
        return {"states": x, "merged": self.merger(x.reshape(-1, 4 * WIDTH)), "layers": (x,), "nothing": None}


class Padded(Rows):
    """Images [n, 1, H, W] padded to one size; each is cut to its own, and they go on in one row of a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, WIDTH, 2, 2)

    def forward(self, rows: Tensor, sizes: Tensor) -> Any:
        grids = [x[:, :h, :w] for x, (h, w) in zip(self.convolution(rows), sizes.tolist(), strict=True)]
        x = torch.cat([grid.flatten(1).T for grid in grids]).unsqueeze(0) + self.positions(sizes)
        for block in self.blocks:
            x = block(x[0], sizes.prod(1))[None]
        return x


class Strip(Padded):
    """Patches [1, 1, 2, sum of h * w * 2] of images beside each other in one strip."""

    def forward(self, rows: Tensor, sizes: Tensor) -> Any:
        x = self.convolution(rows).flatten(2).transpose(1, 2) + self.positions(sizes)
        for block in self.blocks:
            x = block(x[0], sizes.prod(1))[None]
        return x


class PackedHost(nn.Module):
    """An image beside a text; the tower's features are pooled for each image."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision = tower
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.text = Encoder(DEPTH)

    def forward(self, rows: Tensor, sizes: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensors:
        found = self.vision(rows, sizes=sizes)
        states = found["states"] if isinstance(found, dict) else found[0]
        images = [part.mean(0) for part in states.split(sizes.prod(1).tolist())]
        words = self.text(self.words(input_ids), attention_mask[:, None, None, :].bool())[:, 0]
        result = {"score": F.cosine_similarity(torch.stack(images), words), "states": states}
        return result | ({"merged": found["merged"], "layer": found["layers"][0]} if isinstance(found, dict) else {})

    def generate(self, **inputs: Tensor) -> Tensor:
        """The image that fits its text best."""
        return self(**inputs)["score"].argmax()


def packed(tower: nn.Module) -> PackedHost:
    """A host with this tower."""
    return lively(PackedHost(tower))


def rows(grids: tuple[tuple[int, int], ...] = GRIDS) -> Tensors:
    """Inputs with images of these sizes in one row."""
    sizes = torch.tensor(grids)
    return {"rows": torch.randn(int(sizes.prod(1).sum()), PIXELS), "sizes": sizes, **text(len(grids), 7)}


def padded(grids: tuple[tuple[int, int], ...] = GRIDS) -> Tensors:
    """Inputs with images of these sizes, padded."""
    sizes = torch.tensor(grids)
    height, width = (2 * sizes.max(0).values).tolist()
    return {"rows": torch.randn(len(grids), 1, height, width), "sizes": sizes, **text(len(grids), 7)}


def strip(grids: tuple[tuple[int, int], ...] = GRIDS) -> Tensors:
    """Inputs with the patches of images of these sizes in one strip."""
    sizes = torch.tensor(grids)
    return {"rows": torch.randn(1, 1, 2, 2 * int(sizes.prod(1).sum())), "sizes": sizes, **text(len(grids), 7)}


def reordered(inputs: Tensors, order: list[int]) -> Tensors:
    """The inputs with their images and texts in another order."""
    given, lengths = inputs["rows"], inputs["sizes"].prod(1).tolist()
    dim, width = (0, 1) if len(given) == sum(lengths) else (0, 0) if len(given) > 1 else (3, 2)
    parts = given.split([length * width or 1 for length in lengths], dim)
    mixed = {name: value[order] for name, value in inputs.items() if name != "rows"}
    return {"rows": torch.cat([parts[number] for number in order], dim), **mixed}
