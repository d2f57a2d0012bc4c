"""MAG, multi-modality alignment guidance (the paper, section on MAG; docs/method.md, "Guidance").

One set of alignment tokens E scores the tokens of every modality; how a token scores is *guidance* G, which pruning reads.
The features that the alignment tokens pool from the two modalities are pulled together by `alignment_loss`.
Start with :class:`AlignmentTokens`. Shapes: B samples, N tokens, K alignment tokens, d_e their width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import ConfigError

ImageOrder = Literal["blocked", "interleaved"]


class AlignmentTokens(nn.Module):
    """E [K, d_e]: one per model, shared by all layers and both modalities; drawn from N(0, 1) by `seed`."""

    def __init__(self, count: int = 100, width: int = 768, *, seed: int = 0) -> None:
        super().__init__()
        if count < 1 or width < 1:
            raise ConfigError(f"{count} alignment tokens of width {width}: both have to be at least 1")
        generator = torch.Generator().manual_seed(seed)
        self.tokens = nn.Parameter(torch.randn(count, width, generator=generator))

    def forward(self, values: Tensor, projection: nn.Module | None = None) -> Tensor:
        """Guidance G [B, N, K] of queries [B, N, d_e], or of values [B, N, d] that `projection` makes queries of.

        The queries themselves are not made then: (X W^T + b) E^T = X (E W)^T + (E b)^T, and alignment tokens are fewer than the
        tokens of a batch.
        """
        if projection is None or type(projection) is not nn.Linear:
            return guidance(values if projection is None else projection(values), self.tokens)
        weight = self.tokens.to(projection.weight.dtype)
        bias = None if projection.bias is None else weight @ projection.bias
        return F.linear(values, weight @ projection.weight, bias)

    def extra_repr(self) -> str:
        return f"count={self.tokens.shape[0]}, width={self.tokens.shape[1]}"


def query_projection(width: int, alignment_width: int, *, seed: int = 0, always: bool = False) -> nn.Module:
    """The map from a stream's width d to d_e, one per block and modality: a Linear, left out where they agree unless `always`.

    Its weights are drawn from N(0, 1 / d) by `seed`, so that queries keep the scale of the stream.
    """
    if width == alignment_width and not always:
        return nn.Identity()
    linear = nn.Linear(width, alignment_width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.normal_(0.0, width**-0.5, generator=generator)
        linear.bias.zero_()
    return linear


def guidance(queries: Tensor, tokens: Tensor) -> Tensor:
    """G = q E^T, not scaled.

    Args:
        queries: q [B, N, d_e], the residual stream at the block's input before its first norm (projected where widths differ).
        tokens: E [K, d_e].

    Returns:
        G [B, N, K].
    """
    return queries @ tokens.to(queries.dtype).transpose(0, 1)


def pooled_features(queries: Tensor, guidance: Tensor, pooled: Tensor | None = None) -> Tensor:
    """Features of one layer, C_l = softmax over tokens of (G / sqrt(d_e)), transposed, times q.

    Args:
        queries: q [B, N, d_e].
        guidance: G [B, N, K].
        pooled: [B, N] bool, the tokens that take part (valid, not the class token); None for all.

    Returns:
        C_l [B, K, d_e]; zero for a sample in which no token takes part. The caller sums over layers.
    """
    scores = guidance.float() / math.sqrt(queries.shape[-1])
    if pooled is not None:
        scores = scores.masked_fill(~pooled.unsqueeze(-1), float("-inf"))
        scores = torch.where(pooled.any(dim=1)[:, None, None], scores, torch.zeros_like(scores))
    weights = scores.softmax(dim=1)
    if pooled is not None:
        weights = weights * pooled.unsqueeze(-1)
    return torch.einsum("bnk,bnd->bkd", weights.to(queries.dtype), queries)


def mean_over_images(features: Tensor, images: int, order: ImageOrder = "blocked") -> Tensor:
    """Features of `images` images per text become one: their mean.

    Args:
        features: [images * B, K, d_e].
        images: m, images that belong to one text.
        order: "blocked" has the first images of all samples, then the second ones; "interleaved" keeps a sample's together.

    Returns:
        [B, K, d_e].

    Raises:
        ConfigError: the batch of features is no multiple of `images`.
    """
    if images < 1 or features.shape[0] % images:
        raise ConfigError(f"{features.shape[0]} feature maps cannot be grouped into samples of {images} images")
    if order == "blocked":
        return features.unflatten(0, (images, -1)).mean(dim=0)
    if order == "interleaved":
        return features.unflatten(0, (-1, images)).mean(dim=1)
    raise ConfigError(f"order of images is {order!r}; allowed: 'blocked', 'interleaved'")


def alignment_loss(vision: Tensor, text: Tensor) -> Tensor:
    """L_align, the mean over samples and alignment tokens of 1 - cos(C_vision, C_text).

    Args:
        vision, text: C, the features summed over layers, [B, K, d_e] each (`mean_over_images` brings pairs to B).

    Returns:
        A scalar, between 0 and 2.

    Raises:
        ConfigError: the shapes differ.
    """
    if vision.shape != text.shape:
        raise ConfigError(
            f"features of vision {tuple(vision.shape)} and text {tuple(text.shape)} differ in shape; "
            "where a sample has several images, group them with mean_over_images"
        )
    return (1.0 - F.cosine_similarity(vision.float(), text.float(), dim=-1)).mean()
