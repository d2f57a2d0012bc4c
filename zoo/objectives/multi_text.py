"""Models that are asked for several texts about each picture or pair: vision, the expensive half, runs once.

Each wraps a model for training; its parameters are the model's, under the prefix ``model.``. Axes: B pictures or pairs, S texts
about each, T tokens of a text, L of an answer, W words.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from zoo.blip.caption import BlipCaption
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.text import key_mask
from zoo.blip.vqa import BlipVqa


class Written(NamedTuple):
    """logits: [B * S, T, W], of the token after each. image_tokens: [B, N, C] that the texts were written from."""

    logits: Tensor
    image_tokens: Tensor


class ManyStatements(nn.Module):
    """BLIP-NLVR with several statements about each pair."""

    def __init__(self, model: BlipNlvr) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs [B, 2, 3, H, W], statements [B, S, T], mask [B, S, T] (1: token) -> logits [B * S, 2] and the class
        tokens of the statements [B * S, C], which auxiliary heads read."""
        statements = input_ids.shape[1]
        first, second = self.model.encode_images(images)
        tokens = self.model.text_encoder(
            input_ids.flatten(0, 1),
            key_mask(attention_mask.flatten(0, 1)),
            first.repeat_interleave(statements, 0),
            second.repeat_interleave(statements, 0),
        )[:, 0]
        return self.model.cls_head(tokens), tokens


class ManyQuestions(nn.Module):
    """BLIP for questions with several of them about each picture, and one answer to each."""

    def __init__(self, model: BlipVqa) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor
    ) -> Written:
        """Pictures [B, 3, H, W], questions and mask [B, S, T] (1: token), answers and mask [B, S, L]."""
        tokens = self.model.visual_encoder(images)
        mask = attention_mask.flatten(0, 1)
        seen = tokens.repeat_interleave(input_ids.shape[1], 0)
        states = self.model.text_encoder(input_ids.flatten(0, 1), key_mask(mask), seen)
        logits = self.model.text_decoder(answer_ids.flatten(0, 1), answer_mask.flatten(0, 1), states, mask)
        return Written(logits, tokens)


class ManyCaptions(nn.Module):
    """BLIP for captions with several of them for each picture."""

    def __init__(self, model: BlipCaption) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Written:
        """Pictures [B, 3, H, W], captions and mask [B, S, T] (1: token)."""
        tokens = self.model.visual_encoder(images)
        seen = tokens.repeat_interleave(input_ids.shape[1], 0)
        return Written(self.model.text_decoder(input_ids.flatten(0, 1), attention_mask.flatten(0, 1), seen), tokens)
