"""Objectives on single pictures whose answers a text decoder writes: :class:`CaptionObjective`, :class:`QuestionObjective`.

Axes: B pictures, S texts about each, T tokens of a text, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from madtp.training.batch_shares import Batch
from zoo.blip.caption import BlipCaption
from zoo.blip.config import BlipConfig
from zoo.blip.losses import next_token_losses
from zoo.blip.vqa import BlipVqa
from zoo.objectives.base import Metrics
from zoo.objectives.multi_text import DecoderOutput, ManyCaptions, ManyQuestions
from zoo.objectives.scene_base import QUESTION_STREAM, PictureObjective, text_inputs
from zoo.objectives.scene_batches import Picture
from zoo.scenes.objects import draws_for
from zoo.scenes.single import draw_question
from zoo.tasks.encode_text import spell
from zoo.tasks.vocabulary import words_for

DecoderModelT = TypeVar("DecoderModelT", bound=BlipCaption | BlipVqa)


class _DecoderObjective(PictureObjective[DecoderModelT, DecoderOutput]):
    """Texts that a decoder writes. A pruned model follows the dense one's logits and, where they survive, image tokens."""

    target: ClassVar[tuple[str, str]]
    """Ids and mask of what is written, ``[B, S, T]``."""

    def __init__(self, model: DecoderModelT, texts: int) -> None:
        super().__init__(model, texts, model.config.vision.width)

    def losses(self, module: nn.Module, batch: Batch, output: DecoderOutput, progress: float) -> tuple[Tensor, Metrics]:
        del module, progress
        ids, mask = (batch[name].flatten(0, 1) for name in self.target)
        losses, _ = next_token_losses(output.logits.float(), ids, mask)
        loss = losses.sum() / batch["words"]
        return loss, {"task": loss.detach(), "accuracy": self._hits(output, batch).float().mean()}

    def scores(self, outputs: Sequence[DecoderOutput], batches: Sequence[Batch]) -> dict[str, float]:
        hits = torch.cat([self._hits(output, batch) for output, batch in zip(outputs, batches, strict=True)])
        return {"accuracy": float(hits.float().mean())}

    def logits(self, output: DecoderOutput) -> Tensor:
        return output.logits

    def distance_to_teacher(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, *, output: DecoderOutput, target: DecoderOutput
    ) -> Tensor:
        distance = super().distance_to_teacher(student, teacher, batch, output=output, target=target)
        return distance + self.image_token_distance(student, output.image_tokens, target.image_tokens)

    def _hits(self, output: DecoderOutput, batch: Batch) -> Tensor:
        """Return which words of all texts are right, given those before them."""
        ids, mask = (batch[name].flatten(0, 1)[:, 1:] for name in self.target)
        return (output.logits[:, :-1].argmax(-1) == ids)[mask.bool()]

    def _spell(self, texts: Sequence[str], first: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask ``[B, S, T]``."""
        config: BlipConfig = self.model.config
        ids, mask = spell(words_for(config.text.vocabulary, None), texts, first=first, end=config.end_id)
        shape = (-1, self.texts, ids.shape[-1])
        return ids.reshape(shape), mask.reshape(shape)


def _predicted_words(mask: Tensor) -> Tensor:
    """Return how many words are predicted of texts with this mask, ``[B, S, T]``: all but the first of each."""
    return (mask[..., 1:] != 0).sum().float()


class CaptionObjective(_DecoderObjective[BlipCaption]):
    """Captions of pictures, S of the four orders in which things can be named."""

    data = "scenes_captions"
    target = ("input_ids", "attention_mask")

    def __init__(self, model: BlipCaption, texts: int) -> None:
        super().__init__(model, texts)
        self.module = ManyCaptions(model)

    def encode_texts(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        ids, mask = self._spell(self.pick_captions(pictures, self.texts), self.model.config.decode_id)
        return {"input_ids": ids, "attention_mask": mask, "words": _predicted_words(mask)}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return text_inputs(batch)


class QuestionObjective(_DecoderObjective[BlipVqa]):
    """Questions about pictures, with answers of one word."""

    data = "scenes_questions"
    target = ("answer_ids", "answer_mask")

    def __init__(self, model: BlipVqa, texts: int) -> None:
        super().__init__(model, texts)
        self.module = ManyQuestions(model)

    def encode_texts(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        asked = []
        for picture in pictures:
            draws = draws_for(picture.seed, picture.split, picture.index, QUESTION_STREAM + picture.side)
            asked += [draw_question(picture.census, picture.side, draws) for _ in range(self.texts)]
        config = self.model.config
        ids, mask = self._spell([question.question for question in asked], config.encode_id)
        answer_ids, answer_mask = self._spell([question.answer for question in asked], config.decode_id)
        answers = {"answer_ids": answer_ids, "answer_mask": answer_mask, "words": _predicted_words(answer_mask)}
        return {"input_ids": ids, "attention_mask": mask, **answers}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {**text_inputs(batch), "answer_ids": batch["answer_ids"], "answer_mask": batch["answer_mask"]}

    def _hits(self, output: DecoderOutput, batch: Batch) -> Tensor:
        return output.logits[:, 0].argmax(-1) == batch["answer_ids"].flatten(0, 1)[:, 1]
