"""Text encoder of BLIP-NLVR: a post-norm BERT whose layers attend to two images. Start with `TextEncoder`.

Module names follow the published checkpoint, which is why they are not snake case everywhere. Axes: B samples,
T text tokens, N vision tokens of one image, C width of the text encoder, V width of the vision tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import DataError
from zoo.blip.config import TextConfig

LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02


class TextEmbeddings(nn.Module):
    """Word plus position embeddings, normalised: ids [B, T] -> [B, T, C]."""

    position_ids: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width, padding_idx=config.pad_id)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("position_ids", torch.arange(config.positions)[None], persistent=False)

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """`start` is the position of the first id, for a text that is fed in pieces."""
        end, limit = start + input_ids.shape[1], self.position_ids.shape[1]
        if end > limit:
            raise DataError(f"The text is {end} tokens long and the model has {limit} positions; cut the text.")
        positions = self.position_embeddings(self.position_ids[:, start:end])
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + positions))


class AttentionHeads(nn.Module):
    """Multi-head attention without output projection.

    Queries come from x [B, T, C], keys and values from source [B, S, source_width].
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
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, heads, T, head_dim]."""
        return self._split_heads(self.query(x))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, source_width] -> keys and values, each [B, heads, S, head_dim]."""
        return self._split_heads(self.key(source)), self._split_heads(self.value(source))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns [B, T, C]; `mask` (bool, broadcast to [B, heads, T, S]) is True where a key may be attended."""
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout.p if self.training else 0.0
        )
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns [B, T, C]; for `mask` see :meth:`attend`."""
        return self.attend(self.queries(x), *self.keys_values(source), mask)


class ResidualOutput(nn.Module):
    """Projection, residual add and norm that close a sublayer: LayerNorm(residual + dense(x)), [B, T, C]."""

    def __init__(self, config: TextConfig, in_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class TwinOutput(nn.Module):
    """As `ResidualOutput` for the two cross-attentions; their projections are averaged."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense0 = nn.Linear(config.width, config.width)
        self.dense1 = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + second) / 2

    def forward(self, first: Tensor, second: Tensor, residual: Tensor) -> Tensor:
        merged = self.combine(self.dense0(first), self.dense1(second))
        return self.LayerNorm(self.dropout(merged) + residual)


class MergedTwinOutput(TwinOutput):
    """As `TwinOutput`, merging by a linear layer on the concatenation [B, T, 2C]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.merge_layer = nn.Linear(2 * config.width, config.width)

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        return self.merge_layer(torch.cat([first, second], dim=-1))


class SelfAttention(nn.Module):
    """Self-attention sublayer, [B, T, C] -> [B, T, C]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self = AttentionHeads(config, config.width)
        self.output = ResidualOutput(config, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.self(x, x, mask), x)


class TwinCrossAttention(nn.Module):
    """Cross-attention sublayer to both images, each with weights of its own; no vision token is masked."""

    def __init__(self, config: TextConfig, vision_width: int, layer: int) -> None:
        super().__init__()
        self.self0 = AttentionHeads(config, vision_width)
        self.self1 = AttentionHeads(config, vision_width)
        self.output = MergedTwinOutput(config) if layer >= config.merge_from_layer else TwinOutput(config)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return self.output(self.self0(x, first), self.self1(x, second), x)


class Intermediate(nn.Module):
    """First half of the feed-forward sublayer, [B, T, C] -> [B, T, mlp_width]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class TextLayer(nn.Module):
    """Self-attention, twin cross-attention and feed-forward, each post-norm."""

    def __init__(self, config: TextConfig, vision_width: int, layer: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.crossattention = TwinCrossAttention(config, vision_width, layer)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, config.mlp_width)

    def forward(self, x: Tensor, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        x = self.attention(x, mask)
        x = self.crossattention(x, first, second)
        return self.output(self.intermediate(x), x)


class TextLayers(nn.Module):
    """The layers in order; a module of its own only because the checkpoint names it."""

    def __init__(self, config: TextConfig, vision_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(TextLayer(config, vision_width, layer) for layer in range(config.depth))

    def forward(self, x: Tensor, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask, first, second)
        return x


class TextEncoder(nn.Module):
    """Encodes a statement while looking at two images."""

    def __init__(self, config: TextConfig, vision_width: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = TextLayers(config, vision_width)
        self.apply(init_weights)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Encode statements.

        Args:
            input_ids: [B, T] long, T at most `config.positions`.
            attention_mask: [B, T], 1 for a token, 0 for padding.
            first: vision tokens of the first image, [B, N, V].
            second: vision tokens of the second image, [B, N, V].

        Returns:
            [B, T, C]; position 0 is the class token.

        Raises:
            DataError: T exceeds `config.positions`.
        """
        mask = attention_mask.to(torch.bool)[:, None, None, :]
        return self.encoder(self.embeddings(input_ids), mask, first, second)


def init_weights(module: nn.Module) -> None:
    """Start values of one module, as BERT has them."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
