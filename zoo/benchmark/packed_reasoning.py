"""The floor of BLIP for reasoning about two images: :class:`PackedReasoning`.

The model's own layers run on packed rows. Padding never enters: a text has as many rows as it has tokens. A pruning site of the
text lies behind the norm of the self-attention, so cross-attention and feed-forward run on the survivors. Axes: B pairs, T rows
of text, S rows of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.benchmark.packed_rows import Lengths, TokenCounts, attend, cut, first_rows, kept_by_block
from zoo.benchmark.packed_vision import PackedVisionTower
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.text import AttentionHeads, TextEmbeddings


class PackedReasoning:
    """Runs the model on fixed numbers of tokens.

    Args:
        model: BLIP for reasoning.
    """

    def __init__(self, model: BlipNlvr) -> None:
        self.model = model
        self.vision = PackedVisionTower(model.visual_encoder)

    def __call__(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, counts: TokenCounts) -> Tensor:
        """Run on a batch with the tokens of each site; arguments and logits are those of the model."""
        rows, lengths = self.vision.embed(images.transpose(0, 1).flatten(0, 1))
        kept = kept_by_block(counts, "visual_encoder.blocks.", self.vision.depth, lengths)
        rows, lengths = self.vision.blocks(rows, lengths, kept)
        pairs = len(lengths) // 2
        seen = sum(lengths[:pairs])
        sources = ((rows[:seen], lengths[:pairs]), (rows[seen:], lengths[pairs:]))
        encoder: Any = self.model.text_encoder
        words, texts = embed_words(encoder.embeddings, input_ids, attention_mask)
        layers = encoder.encoder.layer
        behind = kept_by_block(counts, "text_encoder.encoder.layer.", len(layers), texts)
        for layer, after in zip(layers, behind, strict=True):
            words = run_layer(layer, words, texts, after, sources)
            texts = after
        logits: Tensor = self.model.cls_head(first_rows(words, texts))
        return logits


def embed_words(embeddings: TextEmbeddings, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Lengths]:
    """Ids ``[B, L]`` and their mask -> embedded rows ``[T, C]`` without padding, and their lengths."""
    real = attention_mask.bool()
    positions = embeddings.position_ids[:, : input_ids.shape[1]].expand_as(input_ids)
    embedded = embeddings.word_embeddings(input_ids[real]) + embeddings.position_embeddings(positions[real])
    return embeddings.dropout(embeddings.LayerNorm(embedded)), tuple(real.sum(1).tolist())


def run_layer(
    layer: Any, rows: Tensor, lengths: Lengths, kept: Lengths, sources: Sequence[tuple[Tensor, Lengths]]
) -> Tensor:
    """Run one layer of the text encoder.

    Args:
        layer: A layer with cross-attention to two images.
        rows: ``[T, C]``.
        lengths: Rows of each text.
        kept: Rows of each text from the cross-attention on.
        sources: Of the first and the second images, the rows ``[S, V]`` and their lengths.

    Returns:
        ``[T', C]``, with T' the sum of ``kept``.
    """
    rows = layer.attention.output(_attend(layer.attention.self, rows, lengths, rows, lengths), rows)
    rows = cut(rows, kept)
    cross = layer.crossattention
    (first, first_lengths), (second, second_lengths) = sources
    mixed = (
        _attend(cross.self0, rows, kept, first, first_lengths),
        _attend(cross.self1, rows, kept, second, second_lengths),
    )
    rows = cross.output(*mixed, rows)
    output: Tensor = layer.output(layer.intermediate(rows), rows)
    return output


def _attend(heads: AttentionHeads, rows: Tensor, lengths: Lengths, source: Tensor, source_lengths: Lengths) -> Tensor:
    shape = (heads.num_heads, heads.head_dim)
    queries, keys, values = (
        torch.unflatten(projected, -1, shape)
        for projected in (heads.query(rows), heads.key(source), heads.value(source))
    )
    return attend(queries, keys, values, lengths, source_lengths)
