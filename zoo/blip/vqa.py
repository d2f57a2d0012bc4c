"""BLIP for questions about images: an encoder reads the question, a decoder writes the answer. Start with :class:`BlipVqa`.

``decoding.py`` writes answers, or ranks those of a list.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zoo.blip.checkpoint import PRUNING_ROWS, VQA_TABLES
from zoo.blip.config import BlipConfig
from zoo.blip.decoder import TextDecoder
from zoo.blip.text import TextEncoder, key_mask, single_source_attention
from zoo.blip.vision import build_vision_tower
from zoo.checkpoints.key_table import KeyTable, Row


class VqaOutput(NamedTuple):
    """What :class:`BlipVqa` returns.

    Attributes:
        logits: ``[A, L, vocabulary]`` of the token after each token of an answer; None without answers.
        question_states: ``[B, T, C]``.
    """

    logits: Tensor | None
    question_states: Tensor


class BlipVqa(nn.Module):
    """Vision tower, question encoder, answer decoder.

    Axes: B questions, T tokens of a question, A answers, L tokens of an answer, C text width.
    """

    checkpoint_tables: ClassVar[tuple[KeyTable, ...]] = VQA_TABLES
    pruning_rows: ClassVar[tuple[Row, ...]] = PRUNING_ROWS

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_tower(config.vision)
        self.text_encoder = TextEncoder(config.text, single_source_attention(config.text, config.vision.width))
        self.text_decoder = TextDecoder(config.text, config.text.width, begin_id=config.decode_id, end_id=config.end_id)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        answer_ids: Tensor | None = None,
        answer_mask: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> VqaOutput:
        """Encode questions, and score answers.

        Args:
            images: normalised, ``[B, 3, H, W]``.
            input_ids: questions ``[B, T]``, [ENC] first.
            attention_mask: ``[B, T]``, 1 for a token, 0 for padding.
            answer_ids: ``[A, L]``, [DEC] first.
            answer_mask: ``[A, L]``, 1 for a token, 0 for padding, which stands at the end.
            owners: [A], the question that each answer belongs to; None means one answer a question, in order.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.text_encoder(input_ids, key_mask(mask), self.visual_encoder(images))
        if answer_ids is None:
            return VqaOutput(None, states)
        answer_mask = torch.ones_like(answer_ids) if answer_mask is None else answer_mask
        if owners is None:
            owners = torch.arange(states.shape[0], device=states.device)
        source, source_mask = states.index_select(0, owners), mask.index_select(0, owners)
        return VqaOutput(self.text_decoder(answer_ids, answer_mask, source, source_mask), states)
