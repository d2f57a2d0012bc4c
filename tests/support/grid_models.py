"""Hand-written models whose blocks read the grid, and what they must yield with given tokens dropped.

Start at :class:`GridNet`. Its forward takes, for the oracle alone, which tokens [B, N] are left after each block's attention:
dropped ones keep the last state they had and are hidden from later attention by the model itself.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from model_case import DEPTH
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp import PrunedModel, PruningConfig

WIDTH, HEADS, PATCH, WINDOW = 16, 2, 4, 4


class Reduced(nn.Module):
    """Attention to keys of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.shrink, self.norm = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.query, self.both, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        batch, count, channels = x.shape
        small = self.shrink(x.permute(0, 2, 1).reshape(batch, channels, height, width)).flatten(2).transpose(1, 2)
        k, v = self.both(self.norm(small)).reshape(batch, -1, 2, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
        q = self.query(x).reshape(batch, count, HEADS, -1).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Global(nn.Module):
    """Attention of each token to each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor, alive: Tensor | None) -> Tensor:
        """Tokens [B, N, C]; ``alive`` [B, N] says which keys are seen."""
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mask = None
        if alive is not None:
            mask = alive[:, None, None, :] | ~alive.any(1)[:, None, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        return self.attend(x, alive)


class Shifted(Global):
    """Attention in windows of a padded grid that is shifted by ``shift``."""

    def __init__(self, shift: int = 1) -> None:
        super().__init__()
        self.shift = shift

    def windows(self, x: Tensor, height: int, width: int, fill: float) -> Tensor:
        """[B, N, C] to windows [B * n, w * w, C]; what is padded holds ``fill``."""
        x = x.view(len(x), height, width, -1)
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW), value=fill)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        batch, tall, wide, channels = x.shape
        x = x.view(batch, tall // WINDOW, WINDOW, wide // WINDOW, WINDOW, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, WINDOW * WINDOW, channels)

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        seen = None if alive is None else self.windows(alive[:, :, None].float(), height, width, 1.0)[:, :, 0] > 0
        y = self.attend(self.windows(x, height, width, 0.0), seen)
        tall, wide = height + -height % WINDOW, width + -width % WINDOW
        y = y.view(len(x), tall // WINDOW, wide // WINDOW, WINDOW, WINDOW, -1)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(len(x), tall, wide, -1)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        return y[:, :height, :width].reshape(x.shape)


class Masked(Shifted):
    """The same, spelled out, with a mask of each of 4 windows that is added where windows stand beside samples."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = nn.Parameter(torch.randn(4, 1, WINDOW**2, WINDOW**2))

    def beside(self, scores: Tensor) -> Tensor:
        """Scores [B * n, H, w * w, w * w] as [B, n, H, w * w, w * w]."""
        return scores.view(-1, len(self.masks), *scores.shape[1:])

    def attend(self, x: Tensor, alive: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * 0.3
        scores = (self.beside(scores) + self.masks).view(scores.shape)
        if alive is not None:
            seen = alive[:, None, None, :] | ~alive.any(1)[:, None, None, None]
            scores = scores.masked_fill(~seen, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class Convolved(Global):
    """Queries, keys and values of a depthwise convolution over the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        grid = x.transpose(1, 2).view(len(x), -1, height, width)
        return self.attend(self.mix(grid).flatten(2).transpose(1, 2), None)


class Channels(Global):
    """Attention of each channel to each, over all tokens."""

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 4, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.2).permute(0, 3, 1, 2).reshape(x.shape))


class Plain(nn.Module):
    """A feed-forward for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Depthwise(Plain):
    """A feed-forward with a depthwise convolution over the grid in it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3 * WIDTH, 3 * WIDTH, 3, padding=1, groups=3 * WIDTH)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = self.up(x)
        grid = y.transpose(1, 2).view(len(y), -1, height, width)
        return self.down(F.gelu(self.mix(grid).flatten(2).transpose(1, 2)))


ATTENTION = {"global": Global, "reduced": Reduced, "windows": Shifted, "masked": Masked, "convolved": Convolved}
FEED_FORWARD = {"plain": Plain, "depthwise": Depthwise}


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, attention: str, feed_forward: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = ATTENTION[attention](), FEED_FORWARD[feed_forward]()

    def forward(
        self, x: Tensor, height: int, width: int, before: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        x = _frozen(x + self.attention(self.norm1(x), height, width, before), x, before)
        return _frozen(x + self.mlp(self.norm2(x), height, width), x, after)


class GridNet(nn.Module):
    """Patches [B, N, C], blocks, a norm; returns the mean token and all tokens."""

    def __init__(self, attention: str, feed_forward: str = "plain", depth: int = DEPTH) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(attention, feed_forward) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor, kept: list[Tensor] | None = None) -> dict[str, Tensor]:
        x = self.patches(pixels)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        left = [None] * (len(self.blocks) + 1) if kept is None else [None, *kept]
        for number, block in enumerate(self.blocks):
            x = block(x, height, width, left[number], left[number + 1])
        tokens = self.norm(x)
        if left[-1] is None:
            return {"mean": tokens.mean(1), "tokens": tokens}
        weight = left[-1][:, :, None].float()
        return {"mean": (tokens * weight).sum(1) / weight.sum(1), "tokens": tokens}


class Standing(nn.Module):
    """The same blocks on a stream [B, H, W, C]; ``pooled``: only their mean is returned."""

    def __init__(self, net: GridNet, *, pooled: bool = False) -> None:
        super().__init__()
        self.patches, self.blocks, self.norm, self.pooled = net.patches, net.blocks, net.norm, pooled

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patches(pixels).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        for block in self.blocks:
            y = block.norm1(x).reshape(batch, height * width, channels)  # type: ignore[union-attr, operator]
            y = block.attention(y, height, width, None).reshape(x.shape)  # type: ignore[union-attr, operator]
            x = x + y
            x = x + block.mlp(block.norm2(x), height, width)  # type: ignore[union-attr, operator]
        x = self.norm(x)
        if self.pooled:
            return {"mean": x.mean((1, 2))}
        return {"mean": x.flatten(1, 2).mean(1), "tokens": x}


def _frozen(new: Tensor, old: Tensor, alive: Tensor | None) -> Tensor:
    return new if alive is None else torch.where(alive[:, :, None], new, old)


def pixels(batch: int, rows: int = 6, columns: int = 6) -> Tensor:
    return torch.randn(batch, 3, rows * PATCH, columns * PATCH)


def rewritten(model: nn.Module, gain: float = 1.5, **settings: object) -> PrunedModel:
    config = PruningConfig(**{"alignment_tokens": 10, "gain": gain, **settings})  # type: ignore[arg-type]
    return madtp.rewrite(model, {"pixels": pixels(3)}, config=config)


def copied(pruned: PrunedModel, **settings: object) -> PrunedModel:
    """A copy with other settings; rewriting once more would take seconds."""
    own = copy.deepcopy(pruned)
    own.madtp.control.config = replace(own.madtp.control.config, **settings)  # type: ignore[arg-type]
    return own


def survivors(batch: int, count: int, depth: int, seed: int) -> list[Tensor]:
    """Random tokens [B, N] that are left at each site, fewer at each."""
    generator = torch.Generator().manual_seed(seed)
    now, kept = torch.ones(batch, count, dtype=torch.bool), []
    for _ in range(depth):
        now = now & (torch.rand(batch, count, generator=generator) < 0.6)
        now[:, seed % count] = True
        kept.append(now)
    return kept


def assert_dense_is_original(model: nn.Module, pruned: PrunedModel, batches: tuple[int, ...]) -> None:
    """With pruning off, outputs are those of ``model`` in batches of these sizes."""
    for batch in batches:
        given = pixels(batch)
        with pruned.dense():
            for key, value in model(given).items():
                assert gap(value, pruned(pixels=given)[key]) < 5e-6, key


def assert_samples_ignore_batch_mates(pruned: PrunedModel) -> None:
    """Samples of a batch keep different numbers of tokens, and yield alone what they yield together."""
    given = pixels(4)
    together = pruned(pixels=given)
    assert len(set(pruned.token_counts()["blocks.1"].tolist())) > 1
    for row in range(4):
        for key, value in pruned(pixels=given[row : row + 1]).items():
            assert gap(together[key][row : row + 1], value) < 1e-4
