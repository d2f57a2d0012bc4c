"""Models that are asked for several texts about each picture or pair: vision, the expensive half, runs once.

Each class wraps a model for training; its parameters are the model's, under the prefix ``model.``. Axes: B pictures or pairs, S
texts about each, T tokens of a text, L tokens of an answer, N vision tokens, C width, W words.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor, nn

from zoo.blip.caption import BlipCaption
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.text import TextLayer, key_mask
from zoo.blip.vqa import BlipVqa


class StatementOutput(NamedTuple):
    """What is said about statements.

    Attributes:
        logits: ``[B * S, 2]``, index 1 for true.
        class_tokens: Class tokens of the statements, ``[B * S, C]``, which auxiliary heads read.
    """

    logits: Tensor
    class_tokens: Tensor


class DecoderOutput(NamedTuple):
    """What a text decoder returns.

    Attributes:
        logits: Of the token after each, ``[B * S, T, W]``.
        image_tokens: Vision tokens that the texts attend to, ``[B, N, C]``.
    """

    logits: Tensor
    image_tokens: Tensor


class ManyStatements(nn.Module):
    """BLIP-NLVR with several statements about each pair."""

    def __init__(self, model: BlipNlvr) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> StatementOutput:
        """Take pairs ``[B, 2, 3, H, W]``, statements ``[B, S, T]`` and their mask, 1 for a token."""
        statements = input_ids.shape[1]
        first, second = self.model.encode_images(images)
        tokens: Tensor = self.model.text_encoder(
            input_ids.flatten(0, 1),
            key_mask(attention_mask.flatten(0, 1)),
            first.repeat_interleave(statements, 0),
            second.repeat_interleave(statements, 0),
        )[:, 0]
        return StatementOutput(self.model.cls_head(tokens), tokens)


class JointStatements(nn.Module):
    """The same as :class:`ManyStatements`, where all statements about a pair share the keys and values of its vision tokens.

    For cross-attention, the statements about a pair are simply more queries. This is cheaper, but does not call the text
    encoder as a whole: it serves training from scratch, not a model that is rewritten.
    """

    def __init__(self, model: BlipNlvr) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> StatementOutput:
        """Take pairs ``[B, 2, 3, H, W]``, statements ``[B, S, T]`` and their mask, 1 for a token."""
        first, second = self.model.encode_images(images)
        return self.read(input_ids, attention_mask, first, second)

    def read(self, input_ids: Tensor, attention_mask: Tensor, first: Tensor, second: Tensor) -> StatementOutput:
        """Classify statements about encoded images.

        Args:
            input_ids: Statements, ``[B, S, T]``.
            attention_mask: ``[B, S, T]``, 1 for a token.
            first: Vision tokens of the first images, ``[B, N, C]``.
            second: Vision tokens of the second images, ``[B, N, C]``.
        """
        encoder = self.model.text_encoder
        pairs, statements, length = input_ids.shape
        keep = attention_mask.flatten(0, 1).bool()[:, None, None, :]
        x: Tensor = encoder.embeddings(input_ids.flatten(0, 1))
        for module in encoder.encoder.layer:
            layer = cast(TextLayer, module)
            x = layer.attention(x, keep)
            x = layer.crossattention(x.reshape(pairs, statements * length, -1), first, second)
            x = x.reshape(pairs * statements, length, -1)
            x = layer.output(layer.intermediate(x), x)
        tokens = x[:, 0]
        return StatementOutput(self.model.cls_head(tokens), tokens)


class ManyQuestions(nn.Module):
    """BLIP for questions with several of them about each picture, and one answer to each."""

    def __init__(self, model: BlipVqa) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor
    ) -> DecoderOutput:
        """Take pictures ``[B, 3, H, W]``, questions ``[B, S, T]``, answers ``[B, S, L]``, and masks, 1 for a token."""
        tokens: Tensor = self.model.visual_encoder(images)
        mask = attention_mask.flatten(0, 1)
        repeated = tokens.repeat_interleave(input_ids.shape[1], 0)
        states: Tensor = self.model.text_encoder(input_ids.flatten(0, 1), key_mask(mask), repeated)
        logits: Tensor = self.model.text_decoder(answer_ids.flatten(0, 1), answer_mask.flatten(0, 1), states, mask)
        return DecoderOutput(logits, tokens)


class ManyCaptions(nn.Module):
    """BLIP for captions with several of them for each picture."""

    def __init__(self, model: BlipCaption) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> DecoderOutput:
        """Take pictures ``[B, 3, H, W]``, captions ``[B, S, T]`` and their mask, 1 for a token."""
        tokens: Tensor = self.model.visual_encoder(images)
        repeated = tokens.repeat_interleave(input_ids.shape[1], 0)
        logits: Tensor = self.model.text_decoder(input_ids.flatten(0, 1), attention_mask.flatten(0, 1), repeated)
        return DecoderOutput(logits, tokens)
