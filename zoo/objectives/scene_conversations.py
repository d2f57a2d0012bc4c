"""Conversations about single pictures, for a language model that reads image tokens: :class:`ConversationObjective`.

Axes: B pictures, S questions about each, T tokens of a conversation, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from madtp.pruned import PrunedModel
from madtp.training.batch_shares import Batch
from madtp.training.compression import distillation_loss
from madtp.tuning.search import dense_macs, mac_reduction
from zoo.llava.conversation import ANSWER, Turn, conversation, prompts
from zoo.objectives.base import Metrics
from zoo.objectives.scene_base import QUESTION_STREAM, PictureObjective
from zoo.objectives.scene_batches import Picture
from zoo.scenes.objects import draws_for
from zoo.scenes.single import Asked, draw_question

_QUESTION = "how many small red shapes are there"
"""One as long as any."""

_ORDER = 4
"""Words of a caption that say in which order it names things: the request that it answers."""


class ConversationObjective(PictureObjective[Any, Any]):
    """Up to S different questions about a picture and then its caption, in one conversation, which reads the picture once.

    The caption comes last: it says all that questions ask. A single question comes without, as in use. The model is
    transformers' LLaVA, and what it returns has ``logits`` ``[B, T, W]``.
    """

    data = "scenes_questions"

    def __init__(self, model: Any, texts: int) -> None:
        super().__init__(model, texts, model.config.vision_config.hidden_size)

    @property
    def tower(self) -> nn.Module:
        layers: nn.ModuleList = self.model.model.vision_tower.encoder.layers
        return layers[-1]

    def encode_images(self, images: Tensor) -> None:
        self.model.model.vision_tower(images)

    def encode_texts(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        rows = []
        for picture, caption in zip(pictures, self.pick_captions(pictures, 1), strict=True):
            turns = [Turn(asked.question, asked.answer) for asked in self._questions(picture)]
            if self.texts > 1:
                words = caption.split()
                turns.append(Turn(" ".join(words[:_ORDER]), " ".join(words[_ORDER:])))
            rows.append(conversation(turns, self.model.config.image_seq_length))
        ids = pad_sequence([row[0] for row in rows], batch_first=True)
        mask = pad_sequence([torch.ones_like(row[0]) for row in rows], batch_first=True)
        written = pad_sequence([row[1].long() for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "answer_mask": written, "words": written.sum().float()}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return {"pixel_values": batch["images"], **given}

    def losses(self, module: nn.Module, batch: Batch, output: Any, progress: float) -> tuple[Tensor, Metrics]:
        del module, progress
        predicted, targets = self._predictions(output, batch)
        loss = F.cross_entropy(predicted.float(), targets, reduction="sum") / batch["words"]
        return loss, {"task": loss.detach(), "accuracy": self._hits(output, batch).float().mean()}

    def scores(self, outputs: Sequence[Any], batches: Sequence[Batch]) -> dict[str, float]:
        hits = torch.cat([self._hits(output, batch) for output, batch in zip(outputs, batches, strict=True)])
        return {"accuracy": float(hits.float().mean())}

    def logits(self, output: Any) -> Tensor:
        found: Tensor = output.logits
        return found

    def certainty(self, output: Any) -> Tensor:
        """Return how sure the model is of its words, a scalar; what it predicts behind image tokens means nothing."""
        best = output.logits[:, self.model.config.image_seq_length :].float().topk(2, dim=-1).values
        sure: Tensor = (best[..., 0] - best[..., 1]).sum()
        return sure

    def distance_to_teacher(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, *, output: Any, target: Any
    ) -> Tensor:
        """Return the distance of the logits of the words that the model writes."""
        del student, teacher
        return distillation_loss(self._predictions(output, batch)[0], self._predictions(target, batch)[0])

    def attach(self, pruned: PrunedModel) -> None:
        """Measure what a prompt of one question takes, and saves beside a conversation."""
        batch = self.batch(0, "val", 0, 0, range(4))
        ids, mask = prompts([[Turn(_QUESTION)]] * 4, self.model.config.image_seq_length)
        with torch.no_grad():
            pruned(**self.inputs(batch))
            saved = mac_reduction(pruned)
            pruned(pixel_values=batch["images"], input_ids=ids, attention_mask=mask)
        self._macs_of_prompt, self._more_saved = dense_macs(pruned), mac_reduction(pruned) / saved

    def macs(self, pruned: PrunedModel) -> tuple[float, float]:
        """Return the MACs, pruned and dense, of a prompt of one question.

        A conversation has many more words, all of which stay. So a prompt saves a larger part, by a factor that hardly depends
        on the strength.
        """
        saved = min(1.0, self._more_saved * mac_reduction(pruned))
        return self._macs_of_prompt * (1 - saved), self._macs_of_prompt

    def _predictions(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits ``[M, W]`` and the ids ``[M]`` of the M words that the model writes."""
        written = batch["answer_mask"][:, 1:].bool()
        return output.logits[:, :-1][written], batch["input_ids"][:, 1:][written]

    def _hits(self, output: Any, batch: Batch) -> Tensor:
        """Return which questions are answered rightly, given the turns before, ``[M]``; answers have one word."""
        ids = batch["input_ids"]
        asked = (ids == ANSWER) & (batch["attention_mask"] != 0)
        if self.texts > 1:  # the last answer is the caption
            asked &= asked.flip(1).cumsum(1).flip(1) > 1
        at = asked[:, :-1]
        hits: Tensor = output.logits[:, :-1].argmax(-1)[at] == ids[:, 1:][at]
        return hits

    def _questions(self, picture: Picture) -> list[Asked]:
        """Return up to S different questions about a picture."""
        draws = draws_for(picture.seed, picture.split, picture.index, QUESTION_STREAM + picture.side)
        drawn = [draw_question(picture.census, picture.side, draws) for _ in range(self.texts)]
        return list({asked.question: asked for asked in drawn}.values())
