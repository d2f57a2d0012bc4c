"""Positions: added to the tokens, rotating queries and keys, or biasing scores.

Start at :func:`absolute` and :class:`Relative`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from random_vlts.design import Blocks
from random_vlts.marks import GRID, LONGEST, WIDTH

Rotate = Callable[[Tensor], Tensor]


class Learned(nn.Module):
    """A table of which the first rows are added."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.position_embed = nn.Parameter(torch.zeros(1, length, WIDTH))

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        return x + self.position_embed[:, : x.shape[1]]


class Sinusoidal(nn.Module):
    """Sines and cosines of several speeds, computed when needed."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer(
            "speed", 0.3 ** torch.arange(WIDTH // 2, dtype=torch.get_default_dtype()), persistent=False
        )

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * self.speed
        return x + torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)


class Embedding(nn.Module):
    """A row for each position; with a mask positions count the tokens that are not padding."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.position_embed = nn.Embedding(length, WIDTH)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        if seen is None:
            return x + self.position_embed(torch.arange(x.shape[1], device=x.device))[None]
        return x + self.position_embed(seen.long().cumsum(1) * seen.long())


class Nothing(nn.Module):
    """Positions come in elsewhere."""

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        return x


def absolute(blocks: Blocks, length: int) -> nn.Module:
    """What adds positions to tokens [B, N, C] at the stream's start."""
    makers = {"learned": Learned, "sinusoidal": Sinusoidal, "embedding": Embedding}
    return makers[blocks.positions](length) if blocks.positions in makers else Nothing()


class Rotary(nn.Module):
    """Angles [N, D / 2] of a line, or of a grid behind ``prefix`` learned tokens, and the rotation by them."""

    def __init__(self, blocks: Blocks, prefix: int | None) -> None:
        super().__init__()
        half = WIDTH // blocks.heads // 2
        speed = 0.4 ** torch.arange(half, dtype=torch.get_default_dtype())
        self.form, self.prefix = blocks.positions, prefix
        self.register_buffer("speed", speed, persistent=False)
        if prefix is not None:
            rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
            place = torch.where(torch.arange(half) % 2 == 0, rows.flatten()[:, None], columns.flatten()[:, None])
            skipped = 0 if self.form == "rotary_patches" else prefix
            angle = torch.cat([torch.zeros(skipped, half, dtype=speed.dtype), place * speed])
            self.register_buffer("angle", angle, persistent=False)

    def forward(self, length: int, seen: Tensor | None) -> Rotate:
        if self.form == "rotary_ids":
            angle = self._by_ids(length, seen) if self.prefix is None else self.angle[None]
            cos, sin = (f(torch.cat([angle, angle], -1)).unsqueeze(1) for f in (torch.cos, torch.sin))
            return lambda x: x * cos + _halves(x) * sin
        if self.prefix is None:
            angle = torch.arange(length, device=self.speed.device)[:, None] * self.speed
        else:
            angle = self.angle
        if self.form == "rotary_complex":
            turns = torch.polar(torch.ones_like(angle), angle)
            return lambda x: _complex(x, turns)
        if self.form == "rotary_pairs":
            cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
            return lambda x: x * cos + _pairs(x) * sin
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        if self.form == "rotary_patches" and self.prefix:
            return lambda x: _behind(x, cos, sin, self.prefix)  # type: ignore[arg-type]
        return lambda x: x * cos + _halves(x) * sin

    def _by_ids(self, length: int, seen: Tensor | None) -> Tensor:
        """Angles [B, N, D / 2]: positions count the tokens that are not padding."""
        if seen is None:
            ids = torch.arange(length, device=self.speed.device).unsqueeze(0)
        else:
            ids = (seen.long().cumsum(-1) - 1).clamp(min=0)
        speed = self.speed[None, :, None].expand(ids.shape[0], -1, 1)
        return (speed @ ids[:, None, :].to(speed.dtype)).transpose(1, 2)


def _halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _complex(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


def _behind(x: Tensor, cos: Tensor, sin: Tensor, prefix: int) -> Tensor:
    patches = x[:, :, prefix:]
    return torch.cat([x[:, :, :prefix], patches * cos + _halves(patches) * sin], dim=2)


class Table(nn.Module):
    """A learned number for each head and distance, looked up."""

    def __init__(self, heads: int, length: int | None) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * LONGEST - 1, heads))
        self.heads, self.length = heads, length
        if length is not None:
            self.register_buffer("index", _distances(length).clone() + LONGEST - 1, persistent=False)

    def forward(self, length: int) -> Tensor:
        if self.length is None:
            index = _distances(length, self.table.device) + LONGEST - 1
            return self.table[index].permute(2, 0, 1)[None]
        return self.table[self.index.view(-1)].view(self.length, self.length, self.heads).permute(2, 0, 1)[None]


class Buckets(nn.Module):
    """A learned number for each head and coarse distance."""

    def __init__(self, heads: int, length: int | None) -> None:
        super().__init__()
        self.bucket = nn.Embedding(8, heads)

    def forward(self, length: int) -> Tensor:
        away = _distances(length, self.bucket.weight.device)
        near = away.abs()
        coarse = torch.where(near < 2, near, 2 + (near.to(self.bucket.weight.dtype) / 4).long()).clamp(max=3)
        return self.bucket(coarse + (away > 0).long() * 4).permute([2, 0, 1]).unsqueeze(0)


class Slopes(nn.Module):
    """A fixed slope for each head times the distance."""

    def __init__(self, heads: int, length: int | None) -> None:
        super().__init__()
        slope = 0.5 ** torch.arange(1, heads + 1, dtype=torch.get_default_dtype())
        self.register_buffer("slope", slope, persistent=False)

    def forward(self, length: int) -> Tensor:
        return -_distances(length, self.slope.device).abs()[None] * self.slope[:, None, None]


def _distances(length: int, device: torch.device | None = None) -> Tensor:
    places = torch.arange(length, device=device)
    return places[None, :] - places[:, None]


class Relative(nn.Module):
    """Bias [1, H, N, N] and rotation for N tokens; ``grid``: the fixed (length, prefix) of image tokens."""

    def __init__(self, blocks: Blocks, grid: tuple[int, int] | None) -> None:
        super().__init__()
        rotary = blocks.positions.startswith("rotary")
        biases = {"table": Table, "buckets": Buckets, "slopes": Slopes}
        self.rotary = Rotary(blocks, None if grid is None else grid[1]) if rotary else None
        maker = biases.get(blocks.positions)
        self.bias = None if maker is None else maker(blocks.heads, None if grid is None else grid[0])

    def forward(self, length: int, seen: Tensor | None) -> tuple[Tensor | None, Rotate | None]:
        bias = None if self.bias is None else self.bias(length)
        return bias, None if self.rotary is None else self.rotary(length, seen)
