"""BLIP's mixture of encoder and decoder: a post-norm BERT that may attend to a source. Start with `MedEncoder`, `MedDecoder`.

One kind of layer serves both: with a mask of padding alone it encodes, with a causal one it decodes. `text.py` holds
the sublayers; names follow the published checkpoints. Axes: B samples, T text tokens, S source tokens (of an image, or
of an encoded question), C width, V source width, H heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from zoo.blip.config import TextConfig
from zoo.blip.text import (
    LAYER_NORM_EPS,
    AttentionHeads,
    Intermediate,
    ResidualOutput,
    SelfAttention,
    TextEmbeddings,
    init_weights,
)

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DecoderState:
    """What a decoder remembers between steps.

    Attributes:
        own: keys and values [B, H, T, D] of the text so far, by layer; empty before the first step.
        source: keys and values [B, H, S, D] of the source, by layer.
        source_mask: [B, 1, 1, S] bool, True for a token; None if all are.
        length: T, tokens fed so far.
    """

    own: tuple[KeysValues, ...]
    source: tuple[KeysValues, ...]
    source_mask: Tensor | None
    length: int = 0

    def reorder(self, rows: Tensor) -> DecoderState:
        """The state of the samples `rows` [B'], which may repeat or leave out some."""
        pick = _Pick(rows)
        mask = None if self.source_mask is None else self.source_mask.index_select(0, rows)
        return DecoderState(pick(self.own), pick(self.source), mask, self.length)


@dataclass(frozen=True)
class _Pick:
    rows: Tensor

    def __call__(self, pairs: tuple[KeysValues, ...]) -> tuple[KeysValues, ...]:
        return tuple((key.index_select(0, self.rows), value.index_select(0, self.rows)) for key, value in pairs)


class CrossAttention(nn.Module):
    """Cross-attention sublayer, [B, T, C] with source [B, S, V] -> [B, T, C]."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.self = AttentionHeads(config, source_width)
        self.output = ResidualOutput(config, config.width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, source, mask), x)


class MedLayer(nn.Module):
    """Self-attention, cross-attention (skipped without a source) and feed-forward, each post-norm."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.crossattention = CrossAttention(config, source_width)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, config.mlp_width)

    def forward(self, x: Tensor, mask: Tensor, source: Tensor | None, source_mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        if source is not None:
            x = self.crossattention(x, source, source_mask)
        return self.output(self.intermediate(x), x)

    def step(
        self, x: Tensor, mask: Tensor, before: KeysValues | None, source: KeysValues, source_mask: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        """As `forward` on tokens that follow others: `before` are the keys and values of these."""
        heads, cross = self.attention.self, self.crossattention.self
        key, value = heads.keys_values(x)
        if before is not None:
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        x = self.attention.output(heads.attend(heads.queries(x), key, value, mask), x)
        x = self.crossattention.output(cross.attend(cross.queries(x), *source, source_mask), x)
        return self.output(self.intermediate(x), x), (key, value)


class MedLayers(nn.Module):
    """The layers in order; a module of its own only because the checkpoint names it."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(MedLayer(config, source_width) for _ in range(config.depth))

    def forward(self, x: Tensor, mask: Tensor, source: Tensor | None, source_mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask, source, source_mask)
        return x


class MedEncoder(nn.Module):
    """Encodes text, by itself or while looking at a source."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = MedLayers(config, source_width)
        self.apply(init_weights)

    def forward(
        self, input_ids: Tensor, mask: Tensor, source: Tensor | None = None, source_mask: Tensor | None = None
    ) -> Tensor:
        """Encode texts.

        Args:
            input_ids: [B, T] long, T at most `config.positions`.
            mask: bool, broadcast to [B, H, T, T]: True where a token may be attended.
            source: [B, S, V]; None leaves the cross-attentions out.
            source_mask: bool, broadcast to [B, H, T, S]; None for a source without padding.

        Returns:
            [B, T, C].

        Raises:
            DataError: T exceeds `config.positions`.
        """
        return self.encoder(self.embeddings(input_ids), mask, source, source_mask)


class HeadTransform(nn.Module):
    """[B, T, C] -> [B, T, C], in front of the vocabulary."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.act = nn.GELU()
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.act(self.dense(x)))


class Predictions(nn.Module):
    """Logits over the vocabulary, [B, T, C] -> [B, T, vocabulary]; the checkpoint names the bias twice."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = HeadTransform(config)
        self.decoder = nn.Linear(config.width, config.vocabulary)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class LanguageHead(nn.Module):
    """A module of its own only because the checkpoint names it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)


class MedDecoder(nn.Module):
    """Writes text about a source, token by token, from `begin_id` to `end_id`.

    The word embeddings are the last layer's weights, too.
    """

    def __init__(self, config: TextConfig, source_width: int, *, begin_id: int, end_id: int) -> None:
        super().__init__()
        self.begin_id, self.end_id = begin_id, end_id
        self.bert = MedEncoder(config, source_width)
        self.cls = LanguageHead(config)
        self.cls.apply(init_weights)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, source: Tensor, source_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each.

        Args:
            input_ids: [B, T] long.
            attention_mask: [B, T], 1 for a token, 0 for padding, which stands at the end.
            source: [B, S, V].
            source_mask: [B, S], 1 for a token; None for a source without padding.

        Returns:
            [B, T, vocabulary].
        """
        mask = causal(input_ids.shape[1], 0, input_ids.device) & keys(attention_mask)
        return self.cls(self.bert(input_ids, mask, source, None if source_mask is None else keys(source_mask)))

    def start(self, source: Tensor, source_mask: Tensor | None = None) -> DecoderState:
        """The state before the first token; arguments as for `forward`."""
        pairs = tuple(layer.crossattention.self.keys_values(source) for layer in self._layers())
        return DecoderState((), pairs, None if source_mask is None else keys(source_mask))

    def step(self, input_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Feed the next tokens [B, T] (no padding): logits [B, vocabulary] of the one after them, and the new state."""
        x = self.bert.embeddings(input_ids, state.length)
        mask = causal(input_ids.shape[1], state.length, input_ids.device)
        own = []
        for index, layer in enumerate(self._layers()):
            before = state.own[index] if state.own else None
            x, pair = layer.step(x, mask, before, state.source[index], state.source_mask)
            own.append(pair)
        length = state.length + input_ids.shape[1]
        return self.cls(x[:, -1:])[:, 0], DecoderState(tuple(own), state.source, state.source_mask, length)

    def _layers(self) -> list[MedLayer]:
        return cast("list[MedLayer]", list(self.bert.encoder.layer))


def causal(new: int, before: int, device: torch.device) -> Tensor:
    """[new, before + new] bool: True where one of `new` tokens, which follow `before` others, may attend."""
    rows = torch.arange(before, before + new, device=device)
    return torch.arange(before + new, device=device)[None, :] <= rows[:, None]


def keys(attention_mask: Tensor) -> Tensor:
    """[B, S] (1: token) -> [B, 1, 1, S] bool."""
    return attention_mask.to(torch.bool)[:, None, None, :]
