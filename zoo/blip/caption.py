"""BLIP for captions: a decoder that writes about an image. Start with :class:`BlipCaption`.

``decoding.py`` writes captions with it.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zoo.blip.checkpoint import CAPTION_TABLES, PRUNING_ROWS
from zoo.blip.config import BlipConfig
from zoo.blip.decoder import TextDecoder
from zoo.blip.vision import build_vision_tower
from zoo.checkpoints.key_table import KeyTable, Row


class CaptionOutput(NamedTuple):
    """What :class:`BlipCaption` returns.

    Attributes:
        logits: ``[B, T, vocabulary]`` of the token after each; None without text.
        image_tokens: ``[B, N, V]``.
    """

    logits: Tensor | None
    image_tokens: Tensor


class BlipCaption(nn.Module):
    """Vision tower and text decoder. Axes: B samples, N vision tokens (class token first), V vision width, T text tokens."""

    checkpoint_tables: ClassVar[tuple[KeyTable, ...]] = CAPTION_TABLES
    pruning_rows: ClassVar[tuple[Row, ...]] = PRUNING_ROWS

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_tower(config.vision)
        self.text_decoder = TextDecoder(
            config.text, config.vision.width, begin_id=config.decode_id, end_id=config.end_id
        )

    def forward(
        self, images: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> CaptionOutput:
        """Encode images, and score captions.

        Args:
            images: Normalised, ``[B, 3, H, W]``.
            input_ids: Captions ``[B, T]``, [DEC] first; None to encode the images only.
            attention_mask: ``[B, T]``, 1 for a token, 0 for padding, which stands at the end.
        """
        tokens = self.visual_encoder(images)
        if input_ids is None:
            return CaptionOutput(None, tokens)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return CaptionOutput(self.text_decoder(input_ids, mask, tokens), tokens)
