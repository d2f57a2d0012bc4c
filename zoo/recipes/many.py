"""A BLIP-NLVR model that is asked several statements about each pair: vision, the expensive half, runs once a pair."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.blip.nlvr import BlipNlvr


class ManyStatements(nn.Module):
    """Wraps a model for training; its parameters are the model's, under the prefix ``model.``."""

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
            attention_mask.flatten(0, 1),
            first.repeat_interleave(statements, 0),
            second.repeat_interleave(statements, 0),
        )[:, 0]
        return self.model.cls_head(tokens), tokens
