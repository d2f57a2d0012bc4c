"""BLIP for image-text retrieval: which text fits which image? Start with :class:`BlipRetrieval`.

Contrastive features compare all images with all texts at the price of one pass each. Matching then looks at one pair at a
time, with the text attending to the image, and re-ranks the best. The momentum copies and queues that train the model are
not part of it: ``zoo/objectives/momentum_contrast.py`` has the contrastive loss, ``matching.py`` the matching loss.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import DataError
from zoo.blip.checkpoint import MOMENTUM_TABLE, PRUNING_ROWS, RETRIEVAL_TABLES
from zoo.blip.config import BlipConfig
from zoo.blip.text import TextEncoder, key_mask, single_source_attention
from zoo.blip.vision import build_vision_tower
from zoo.checkpoints.key_table import KeyTable, Row

MATCHES = 2
START_TEMPERATURE = 0.07


class RetrievalOutput(NamedTuple):
    """What :class:`BlipRetrieval` returns; None where the arguments for it were left out.

    Attributes:
        image_features: ``[B, E]``, of length 1.
        text_features: ``[B, E]``, of length 1.
        match_logits: ``[B, 2]``; index 1 says that the text fits the image.
        scale: The factor on products of features, a scalar.
        image_tokens: ``[B, N, V]``, for further calls.
        match_features: ``[B, C]``, what the matching head reads.
    """

    image_features: Tensor | None
    text_features: Tensor | None
    match_logits: Tensor | None
    scale: Tensor
    image_tokens: Tensor | None
    match_features: Tensor | None = None


class BlipRetrieval(nn.Module):
    """Vision tower and text encoder, compared by features and by matching.

    Axes: B samples, N vision tokens (class token first), V vision width, T text tokens, E width of the features.
    """

    checkpoint_tables: ClassVar[tuple[KeyTable, ...]] = RETRIEVAL_TABLES
    pruning_rows: ClassVar[tuple[Row, ...]] = PRUNING_ROWS
    momentum_table: ClassVar[KeyTable] = MOMENTUM_TABLE

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_tower(config.vision)
        self.text_encoder = TextEncoder(config.text, single_source_attention(config.text, config.vision.width))
        self.vision_proj = nn.Linear(config.vision.width, config.embedding)
        self.text_proj = nn.Linear(config.text.width, config.embedding)
        self.itm_head = nn.Linear(config.text.width, MATCHES)
        self.temp = nn.Parameter(torch.tensor(START_TEMPERATURE))

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> RetrievalOutput:
        """Compare images and texts, pair by pair; images alone, or texts alone, are only encoded.

        Args:
            images: normalised, ``[B, 3, H, W]``.
            input_ids: ``[B, T]`` long, [CLS] first.
            attention_mask: ``[B, T]``, 1 for a token, 0 for padding.
            image_tokens: ``[B, N, V]`` of an earlier call, instead of ``images``: then only matching is computed.
            image_mask: ``[B, N]`` of ``image_tokens``, 1 for a token; None for all.
        """
        if (images is None and input_ids is None) or (images is not None and image_tokens is not None):
            raise DataError("pass images, or input_ids, or input_ids with either images or image_tokens.")
        image_features = text_features = match_logits = match_features = None
        if images is not None:
            image_tokens = self.visual_encoder(images)
            image_features = F.normalize(self.vision_proj(image_tokens[:, 0]), dim=-1)
        if input_ids is not None:
            mask = key_mask(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
            if images is not None or image_tokens is None:
                alone = self.text_encoder(input_ids, mask)
                text_features = F.normalize(self.text_proj(alone[:, 0]), dim=-1)
            if image_tokens is not None:
                seen = None if image_mask is None else key_mask(image_mask)
                match_features = self.text_encoder(self._marked(input_ids), mask, image_tokens, seen)[:, 0]
                match_logits = self.itm_head(match_features)
        scale = 1 / self.temp
        return RetrievalOutput(image_features, text_features, match_logits, scale, image_tokens, match_features)

    def _marked(self, input_ids: Tensor) -> Tensor:
        """[ENC] in the place of the first token, ``[B, T]``."""
        first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
        return input_ids.masked_fill(first, self.config.encode_id)
