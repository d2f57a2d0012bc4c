"""BLIP's text decoder: the text encoder with a causal mask, and a head over the vocabulary. Start with :class:`TextDecoder`.

Names follow the published checkpoints. Axes as in ``text.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.blip.config import TextConfig
from zoo.blip.text import (
    LAYER_NORM_EPS,
    CrossAttention,
    TextEncoder,
    TextLayer,
    init_weights,
    key_mask,
    single_source_attention,
)

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DecoderState:
    """The key/value cache of a decoder between two steps.

    Attributes:
        text: Keys and values ``[B, H, T, D]`` of the text so far, by layer; empty before the first step.
        source: Keys and values ``[B, H, S, D]`` of the source, by layer.
        source_mask: ``[B, 1, 1, S]`` bool, True for a token; None if all are.
        length: T, the number of tokens so far.
    """

    text: tuple[KeysValues, ...]
    source: tuple[KeysValues, ...]
    source_mask: Tensor | None
    length: int = 0

    def reorder(self, rows: Tensor) -> DecoderState:
        """Return the state of the samples ``rows`` [B'], which may repeat or leave out some."""
        mask = None if self.source_mask is None else self.source_mask.index_select(0, rows)
        return DecoderState(_select(self.text, rows), _select(self.source, rows), mask, self.length)


def _select(pairs: tuple[KeysValues, ...], rows: Tensor) -> tuple[KeysValues, ...]:
    return tuple((key.index_select(0, rows), value.index_select(0, rows)) for key, value in pairs)


class HeadTransform(nn.Module):
    """``[B, T, C]`` -> ``[B, T, C]``, in front of the vocabulary."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.act = nn.GELU()
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        transformed: Tensor = self.LayerNorm(self.act(self.dense(x)))
        return transformed


class Predictions(nn.Module):
    """Logits over the vocabulary, ``[B, T, C]`` -> ``[B, T, vocabulary]``; the checkpoint names the bias twice."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = HeadTransform(config)
        self.decoder = nn.Linear(config.width, config.vocabulary)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.transform(x))
        return logits


class LanguageHead(nn.Module):
    """A module of its own only because the checkpoint names it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.predictions(x)
        return logits


class TextDecoder(nn.Module):
    """Writes text about a source, token by token, from ``begin_id`` to ``end_id``.

    The word embeddings are tied to the weights of the last layer.
    """

    def __init__(self, config: TextConfig, source_width: int, *, begin_id: int, end_id: int) -> None:
        super().__init__()
        self.begin_id, self.end_id = begin_id, end_id
        self.bert = TextEncoder(config, single_source_attention(config, source_width))
        self.cls = LanguageHead(config)
        self.cls.apply(init_weights)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, source: Tensor, source_mask: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the token after each.

        Args:
            input_ids: ``[B, T]`` long.
            attention_mask: ``[B, T]``, 1 for a token, 0 for padding, which stands at the end.
            source: ``[B, S, V]``.
            source_mask: ``[B, S]``, 1 for a token; None for a source without padding.

        Returns:
            ``[B, T, vocabulary]``.
        """
        mask = causal(input_ids.shape[1], 0, input_ids.device) & key_mask(attention_mask)
        states = self.bert(input_ids, mask, source, None if source_mask is None else key_mask(source_mask))
        logits: Tensor = self.cls(states)
        return logits

    def start(self, source: Tensor, source_mask: Tensor | None = None) -> DecoderState:
        """Return the state before the first token; arguments as for :meth:`forward`."""
        pairs = tuple(cross.self.keys_values(source) for _, cross in self._layers())
        return DecoderState((), pairs, None if source_mask is None else key_mask(source_mask))

    def step(self, input_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Feed the next tokens.

        Args:
            input_ids: ``[B, T]`` long, without padding.
            state: From :meth:`start` or the step before.

        Returns:
            The logits ``[B, vocabulary]`` of the token after them, and the new state.
        """
        x: Tensor = self.bert.embeddings(input_ids, state.length)
        mask = causal(input_ids.shape[1], state.length, input_ids.device)
        cached = []
        for number, (layer, cross) in enumerate(self._layers()):
            heads = layer.attention.self
            key, value = heads.keys_values(x)
            if state.text:
                past_key, past_value = state.text[number]
                key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
            cached.append((key, value))
            x = layer.attention.output(heads.attend(heads.queries(x), key, value, mask), x)
            attended = cross.self.attend(cross.self.queries(x), *state.source[number], state.source_mask)
            x = cross.output(attended, x)
            x = layer.output(layer.intermediate(x), x)
        length = state.length + input_ids.shape[1]
        logits: Tensor = self.cls(x[:, -1:])[:, 0]
        return logits, DecoderState(tuple(cached), state.source, state.source_mask, length)

    def _layers(self) -> Iterator[tuple[TextLayer, CrossAttention]]:
        for layer in self.bert.encoder.layer:
            assert isinstance(layer, TextLayer)
            assert isinstance(layer.crossattention, CrossAttention)
            yield layer, layer.crossattention


def causal(new: int, before: int, device: torch.device) -> Tensor:
    """Return [new, before + new] bool: True where one of ``new`` tokens, which follow ``before`` others, may attend."""
    rows = torch.arange(before, before + new, device=device)
    return torch.arange(before + new, device=device)[None, :] <= rows[:, None]
