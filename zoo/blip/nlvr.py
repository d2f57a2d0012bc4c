"""BLIP for visual reasoning on image pairs (NLVR): is a statement about them true? Start with ``BlipNlvr``.

Parameter names equal those of the published BLIP-NLVR checkpoint (Li et al., "BLIP: Bootstrapping
Language-Image Pre-training for Unified Vision-Language Understanding and Generation", 2022).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from zoo.blip.checkpoint import NLVR_TABLES, PRUNING_ROWS
from zoo.blip.config import NlvrConfig
from zoo.blip.text import TextEncoder, key_mask
from zoo.blip.twin import two_images
from zoo.blip.vision import build_vision_tower
from zoo.checkpoints.key_table import KeyTable, Row

ANSWERS = 2


class BlipNlvr(nn.Module):
    """Vision tower on both images, text encoder with twin cross-attention, answer head on the text's class token.

    The first text id should be the tokenizer's [ENC]; the model takes the ids as they come. Axes: B pairs, N vision
    tokens of one image (class token first), V vision width, T text tokens.
    """

    checkpoint_tables: ClassVar[tuple[KeyTable, ...]] = NLVR_TABLES
    pruning_rows: ClassVar[tuple[Row, ...]] = PRUNING_ROWS

    def __init__(self, config: NlvrConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_tower(config.vision)
        self.text_encoder = TextEncoder(config.text, two_images(config.text, config.vision.width))
        width = config.text.width
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, ANSWERS))

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised image pairs ``[B, 2, 3, H, W]`` -> tokens of the first and of the second images ``[B, N, V]``."""
        batch = images.shape[0]
        tokens = self.visual_encoder(images.transpose(0, 1).flatten(0, 1))
        # Explicit sizes: chunk(2) would leave a guard on the batch that torch.export cannot solve.
        first, second = tokens.split([batch, batch])
        return first, second

    def classify(self, input_ids: Tensor, attention_mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Statements ``[B, T]``, mask ``[B, T]``, images ``[B, N, V]`` -> logits ``[B, 2]`` (mask 1: token; index 1: true)."""
        tokens = self.text_encoder(input_ids, key_mask(attention_mask), first, second)
        logits: Tensor = self.cls_head(tokens[:, 0])
        return logits

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Image pairs ``[B, 2, 3, H, W]``, statements ``[B, T]`` and mask -> logits; see :meth:`classify`."""
        first, second = self.encode_images(images)
        return self.classify(input_ids, attention_mask, first, second)
