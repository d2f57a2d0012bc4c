"""Where a stream [B, N, C] leaves its token axis. Start at :func:`image_readout` and :func:`text_readout`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_vlts.layers import norm
from random_vlts.marks import END, GRID, WIDTH, Pooling, Reads


class First(nn.Module):
    def forward(self, x: Tensor, ids: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        return x[:, 0]


class Last(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        return x[:, -1]


class EndByArgmax(nn.Module):
    """The token of the highest id."""

    def forward(self, x: Tensor, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        return x[torch.arange(x.shape[0], device=x.device), ids.argmax(dim=-1)]


class EndByMatch(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        return x[torch.arange(x.shape[0], device=x.device), (ids == END).int().argmax(dim=-1)]


class EndByLength(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
        return x[torch.arange(x.shape[0], device=x.device), seen.sum(1) - 1]


class EndByGather(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        place = ids.argmax(-1)
        return x.gather(1, place[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1)


class Mean(Pooling):
    """Over all tokens but the first ``skip``."""

    def __init__(self, stream: str, skip: int = 0) -> None:
        super().__init__()
        self.stream, self.skip = stream, skip

    def forward(self, x: Tensor, ids: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        return (x[:, self.skip :] if self.skip else x).mean(dim=1)

    def surviving(self, kept: Tensor, *arguments: Tensor | None) -> Tensor:
        x = arguments[0]
        assert x is not None
        weight = kept[:, self.skip :, None].to(x.dtype)
        return (x[:, self.skip :] * weight).sum(1) / weight.sum(1).clamp(min=1)


class FirstAndMean(nn.Module):
    def __init__(self, stream: str, prefix: int) -> None:
        super().__init__()
        self.mean = Mean(stream, prefix)

    def forward(self, x: Tensor, ids: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        return x[:, 0] + self.mean(x)


class MaskedMean(Pooling):
    """Over the tokens that are not padding."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
        return _weighted_mean(x, seen)

    def surviving(self, kept: Tensor, *arguments: Tensor | None) -> Tensor:
        x, _, seen = arguments
        assert x is not None
        assert seen is not None
        return _weighted_mean(x, seen * kept)


def _weighted_mean(x: Tensor, seen: Tensor) -> Tensor:
    weight = seen.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


class Maximum(Pooling):
    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x: Tensor, ids: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        return x.amax(dim=1)

    def surviving(self, kept: Tensor, *arguments: Tensor | None) -> Tensor:
        x = arguments[0]
        assert x is not None
        return x.masked_fill(~kept[:, :, None], float("-inf")).amax(1)


class AttentionPool(nn.Module):
    """A learned query reads the tokens."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.reads = Reads(stream)
        self.probe = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, ids: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        hidden = None if seen is None else seen == 0
        return self.attention(self.probe.expand(x.shape[0], -1, -1), x, x, key_padding_mask=hidden)[0][:, 0]


class Sequence(nn.Module):
    """All tokens, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = norm("layer")

    def forward(self, x: Tensor, ids: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        return self.norm(x)


class Head(nn.Module):
    """Numbers for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, ids: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        return self.head(F.gelu(x))


class Grid(nn.Module):
    """The patches as a picture, for a convolution."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.convolution = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, x: Tensor, ids: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        patches = x[:, self.prefix :].transpose(1, 2)
        return self.convolution(patches.reshape(x.shape[0], WIDTH, *GRID))


def image_readout(kind: str, stream: str, prefix: int) -> nn.Module:
    """What becomes of the image's tokens."""
    if kind == "mean_of_patches":
        return Mean(stream, prefix)
    if kind == "first_and_mean":
        return FirstAndMean(stream, prefix)
    if kind == "grid":
        return Grid(prefix)
    return _readout(kind, stream)


def text_readout(kind: str, stream: str) -> nn.Module:
    """What becomes of the text's tokens."""
    ends = {
        "last": Last,
        "end_by_argmax": EndByArgmax,
        "end_by_match": EndByMatch,
        "end_by_length": EndByLength,
        "end_by_gather": EndByGather,
    }
    if kind in ends:
        return ends[kind]()
    return MaskedMean(stream) if kind == "masked_mean" else _readout(kind, stream)


def _readout(kind: str, stream: str) -> nn.Module:
    if kind in ("mean", "maximum", "attention"):
        return {"mean": Mean, "maximum": Maximum, "attention": AttentionPool}[kind](stream)
    return {"first": First, "sequence": Sequence, "head": Head}[kind]()
