"""Multi-modality alignment guidance (MAG): how much each alignment token likes each token, and the alignment loss.

Cao et al., CVPR 2024, module MAG; ``docs/method.md``, "Guidance". One set of alignment tokens E scores the tokens of every
modality. The scores are the *guidance* G, which pruning reads. The alignment loss pulls together the features that the
alignment tokens pool from the two modalities. Start at :class:`AlignmentTokens`.

Symbols: B samples, N tokens, C (the paper's d) width of the residual stream, K alignment tokens, d_e their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import ConfigError

ImageOrder = Literal["blocked", "interleaved"]


class AlignmentTokens(nn.Module):
    """The alignment tokens E: one set per model, shared by all layers and both modalities.

    Args:
        count: K, the number of alignment tokens.
        width: d_e, the width of each.
        seed: seed of their initial values, which are drawn from N(0, 1).

    Attributes:
        tokens: the parameter E ``[K, d_e]``.

    Raises:
        ConfigError: ``count`` or ``width`` is below 1.
    """

    def __init__(self, count: int = 100, width: int = 768, *, seed: int = 0) -> None:
        super().__init__()
        if count < 1 or width < 1:
            raise ConfigError(f"{count} alignment tokens of width {width}: both have to be at least 1")
        generator = torch.Generator().manual_seed(seed)
        self.tokens = nn.Parameter(torch.randn(count, width, generator=generator))

    def forward(self, values: Tensor, projection: nn.Module | None = None) -> Tensor:
        """Return the guidance G of a residual stream, in float32 if the stream is in float16, whose range products with massive
        activations leave.

        With a linear projection q = X W^T + b the queries are never materialised:
        G = q E^T = X (E W)^T + (E b)^T, which is cheaper because there are fewer alignment tokens than tokens in a batch.

        Args:
            values: the queries q ``[B, N, d_e]``, or the residual stream X ``[B, N, C]`` if ``projection`` is given.
            projection: the map from X to q, see :func:`query_projection`.

        Returns:
            G ``[B, N, K]``.
        """
        if type(projection) is not nn.Linear:
            queries: Tensor = values if projection is None else projection(values)
            return guidance(_with_range(queries), self.tokens)
        values = _with_range(values)
        weight = self.tokens.to(values.dtype)
        bias = None if projection.bias is None else weight @ projection.bias.to(values.dtype)
        return F.linear(values, weight @ projection.weight.to(values.dtype), bias)

    def extra_repr(self) -> str:
        return f"count={self.tokens.shape[0]}, width={self.tokens.shape[1]}"


def _with_range(values: Tensor) -> Tensor:
    """Values whose products stay within the range of their type."""
    return values.float() if values.dtype == torch.float16 else values


def query_projection(width: int, alignment_width: int, *, seed: int = 0, always: bool = False) -> nn.Module:
    """Return the map from the residual stream X to the queries q, one per block and modality.

    It is an identity where the widths agree and a linear layer elsewhere. The authors' code has a linear layer everywhere in
    one of its models and none in the other; ``always=True`` gives the former.

    Args:
        width: C, the width of the residual stream.
        alignment_width: d_e, the width of the alignment tokens.
        seed: seed of the weights, which are drawn from N(0, 1 / C), so that queries keep the scale of the stream.
        always: use a linear layer even where the widths agree.
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
    """Return the guidance G = q E^T, without scaling.

    Args:
        queries: q ``[B, N, d_e]``: the residual stream at the block's input, before its first norm, projected where the
            widths differ.
        tokens: E ``[K, d_e]``.

    Returns:
        G ``[B, N, K]``.
    """
    return queries @ tokens.to(queries.dtype).transpose(0, 1)


def pooled_features(queries: Tensor, guidance: Tensor, pooled: Tensor | None = None) -> Tensor:
    """Return the features of one layer, C_l = softmax over tokens of (G / sqrt(d_e)), transposed, times q.

    The alignment loss takes their sum over layers, C = sum_l C_l.

    Args:
        queries: q ``[B, N, d_e]``.
        guidance: G ``[B, N, K]``.
        pooled: ``[B, N]`` bool, the tokens that take part: valid and not the class token. None for all tokens.

    Returns:
        C_l ``[B, K, d_e]``; zero for a sample in which no token takes part.
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
    """Return the mean of the features of all images that belong to one text.

    Args:
        features: C of the images ``[m * B, K, d_e]``, summed over layers.
        images: m, the number of images per text.
        order: ``"blocked"``: first the first image of every sample, then the second one of every sample, and so on;
            ``"interleaved"``: the images of a sample stand next to each other.

    Returns:
        C ``[B, K, d_e]``.

    Raises:
        ConfigError: the first dimension is not a multiple of ``images``, or the order is unknown.
    """
    if images < 1 or features.shape[0] % images:
        raise ConfigError(f"{features.shape[0]} feature maps cannot be grouped into samples of {images} images")
    samples = features.shape[0] // images
    if order == "blocked":
        return features.reshape(images, samples, *features.shape[1:]).mean(dim=0)
    if order == "interleaved":
        return features.reshape(samples, images, *features.shape[1:]).mean(dim=1)
    raise ConfigError(f"order of images is {order!r}; allowed: 'blocked', 'interleaved'")


def sum_of_streams(features: Sequence[Tensor], order: ImageOrder = "interleaved") -> Tensor:
    """Return the sum of the features of layers, of which some may have several rows for each sample.

    Two views of an image, the frames of a video or several candidates are rows of their own in a tower, and one row where they
    are joined. Where rows differ, each layer's are averaged to those of the layer that has the fewest.

    Args:
        features: of one modality, each ``[m * B, K, d_e]`` with a number m of its own.
        order: how the rows of a sample stand, as in :func:`mean_over_images`.

    Returns:
        C ``[B, K, d_e]``.

    Raises:
        ConfigError: the rows of a layer are no multiple of those of another.
    """
    fewest = min(one.shape[0] for one in features)
    total = torch.zeros_like(features[0][:fewest])
    for one in features:
        images = max(1, one.shape[0] // max(1, fewest))
        total = total + (one if images == 1 else mean_over_images(one, images, order))
    return total


def alignment_loss(vision: Tensor, text: Tensor) -> Tensor:
    """Return L_align, the mean over samples and alignment tokens of 1 - cos(C_vision, C_text).

    The paper adds 0.1 L_align to the loss of the task.

    Args:
        vision: C of the images ``[B, K, d_e]``, summed over layers; :func:`mean_over_images` groups several images.
        text: C of the texts ``[B, K, d_e]``, summed over layers.

    Returns:
        A scalar between 0 and 2.

    Raises:
        ConfigError: the shapes differ.
    """
    if vision.shape != text.shape:
        raise ConfigError(
            f"features of vision {tuple(vision.shape)} and text {tuple(text.shape)} differ in shape; "
            "where a sample has several images, group them with mean_over_images"
        )
    return (1.0 - F.cosine_similarity(vision.float(), text.float(), dim=-1)).mean()
