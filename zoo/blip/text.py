"""BLIP's text encoder: a post-norm BERT whose layers may attend to a source. Start with :class:`TextEncoder`.

All tasks share it. What its cross-attentions read is up to them: :class:`CrossAttention` reads one source (an image, or an
encoded question), ``twin.py`` has one that reads two images. ``decoder.py`` runs the encoder with a causal mask.

Module names follow the published checkpoints, which is why they are not snake case everywhere. Axes: B samples, T text
tokens, S source tokens, C width of the text, V width of the source, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import DataError
from zoo.blip.config import TextConfig

LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02

MakeCrossAttention = Callable[[int], nn.Module]
"""Makes the cross-attention sublayer of a layer, by the layer's number."""


class TextEmbeddings(nn.Module):
    """Word plus position embeddings, normalised: ids ``[B, T]`` -> ``[B, T, C]``."""

    position_ids: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width, padding_idx=config.pad_id)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("position_ids", torch.arange(config.positions)[None], persistent=False)

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """Embed ids of which the first stands at position ``start``.

        Raises:
            DataError: The text is longer than the model has positions.
        """
        end, limit = start + input_ids.shape[1], self.position_ids.shape[1]
        if end > limit:
            raise DataError(f"The text is {end} tokens long and the model has {limit} positions; cut the text.")
        positions = self.position_embeddings(self.position_ids[:, start:end])
        embedded: Tensor = self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + positions))
        return embedded


class AttentionHeads(nn.Module):
    """Multi-head attention without output projection.

    Queries come from x ``[B, T, C]``, keys and values from source ``[B, S, V]``.
    """

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.head_dim = config.width // config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source_width, config.width)
        self.value = nn.Linear(source_width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def _split_heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` -> ``[B, H, T, D]``."""
        return self._split_heads(self.query(x))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, V]`` -> keys and values, each ``[B, H, S, D]``."""
        return self._split_heads(self.key(source)), self._split_heads(self.value(source))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``[B, T, C]``; ``mask`` (bool, broadcast to ``[B, H, T, S]``) is True where a key may be attended."""
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout.p if self.training else 0.0
        )
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``[B, T, C]``; for ``mask`` see :meth:`attend`."""
        return self.attend(self.queries(x), *self.keys_values(source), mask)


class ResidualOutput(nn.Module):
    """Projection, residual add and norm that close a sublayer: LayerNorm(residual + dense(x)), ``[B, T, C]``."""

    def __init__(self, config: TextConfig, in_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return normed


class SelfAttention(nn.Module):
    """Self-attention sublayer, ``[B, T, C]`` -> ``[B, T, C]``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self = AttentionHeads(config, config.width)
        self.output = ResidualOutput(config, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.output(self.self(x, x, mask), x)
        return out


class CrossAttention(nn.Module):
    """Cross-attention sublayer, ``[B, T, C]`` with source ``[B, S, V]`` -> ``[B, T, C]``."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.self = AttentionHeads(config, source_width)
        self.output = ResidualOutput(config, config.width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` (bool, broadcast to ``[B, H, T, S]``) is True for a token; None if there is no padding."""
        out: Tensor = self.output(self.self(x, source, mask), x)
        return out


class Intermediate(nn.Module):
    """First half of the feed-forward sublayer, ``[B, T, C]`` -> ``[B, T, mlp_width]``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.dense(x))
        return out


class TextLayer(nn.Module):
    """Self-attention, cross-attention (skipped without a source) and feed-forward, each post-norm."""

    def __init__(self, config: TextConfig, number: int, make_cross_attention: MakeCrossAttention) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.crossattention = make_cross_attention(number)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, config.mlp_width)

    def forward(self, x: Tensor, mask: Tensor, *source: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        if source:
            x = self.crossattention(x, *source)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class TextLayers(nn.Module):
    """The layers in order; a module of its own only because the checkpoint names it."""

    def __init__(self, config: TextConfig, make_cross_attention: MakeCrossAttention) -> None:
        super().__init__()
        self.layer = nn.ModuleList(TextLayer(config, number, make_cross_attention) for number in range(config.depth))

    def forward(self, x: Tensor, mask: Tensor, *source: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask, *source)
        return x


class TextEncoder(nn.Module):
    """Encodes text, by itself or while looking at a source.

    Args:
        config: Sizes.
        make_cross_attention: Makes the sublayer that reads the source; see :func:`single_source_attention`.
    """

    def __init__(self, config: TextConfig, make_cross_attention: MakeCrossAttention) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = TextLayers(config, make_cross_attention)
        self.apply(init_weights)

    def forward(self, input_ids: Tensor, mask: Tensor, *source: Tensor | None) -> Tensor:
        """Encode texts.

        Args:
            input_ids: ``[B, T]`` long, T at most ``config.positions``.
            mask: bool, broadcast to ``[B, H, T, T]``: True where a token may be attended.
            source: What the cross-attentions read: tokens ``[B, S, V]`` and their mask for :class:`CrossAttention`, two images
                ``[B, S, V]`` for :class:`~zoo.blip.twin.TwinCrossAttention`. Nothing leaves the cross-attentions out.

        Returns:
            ``[B, T, C]``.

        Raises:
            DataError: T exceeds ``config.positions``.
        """
        encoded: Tensor = self.encoder(self.embeddings(input_ids), mask, *source)
        return encoded


def single_source_attention(config: TextConfig, source_width: int) -> MakeCrossAttention:
    """Return a maker of cross-attention to a single source ``[B, S, V]``, the same in each layer."""
    return lambda number: CrossAttention(config, source_width)


def key_mask(attention_mask: Tensor) -> Tensor:
    """``[B, S]`` (1: token) -> ``[B, 1, 1, S]`` bool."""
    return attention_mask.to(torch.bool)[:, None, None, :]


def init_weights(module: nn.Module) -> None:
    """Initialise one module as BERT does."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
