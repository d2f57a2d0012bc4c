"""What models learn from scenes, and by which losses: :func:`lesson_for`; one class a task.

Dense training and compression both teach a lesson; the model that learns it may be pruned. Axes: B pictures (of statements,
pairs of them), S texts about each, T tokens of a text, L of an answer, E width of features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.training.batch_shares import Batch
from zoo.blip.caption import BlipCaption
from zoo.blip.config import BlipConfig
from zoo.blip.losses import next_token_losses
from zoo.blip.matching import matching_distance, matching_loss
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.retrieval import BlipRetrieval
from zoo.blip.surviving_tokens import seen
from zoo.blip.vqa import BlipVqa
from zoo.clip.model import Clip
from zoo.objectives.auxiliary_heads import ContentHeads, StatementHeads, faded, statement_losses
from zoo.objectives.base import FEATURES, Metrics, PairSubject, Subject
from zoo.objectives.multi_text import ManyCaptions, ManyQuestions, ManyStatements
from zoo.objectives.scene_batches import Picture, draw_batch, make_batch
from zoo.scenes.objects import draws_for
from zoo.scenes.single import captions, draw_question
from zoo.tasks.encode_text import clip_texts, spell
from zoo.tasks.vocabulary import words_for

PADDING = {"input_ids": 0, "attention_mask": 0, "answer_ids": 0, "answer_mask": 0}
"""With what the texts of a batch are padded."""

_ORDER, _QUESTIONS = 2, 4
"""Random streams of the left picture of an item, beside those that scenes draw from; the right one has the next."""

PLACES = 2.0
"""Weight of pointing at what a spatial relation is about, beside counting."""


class Lesson(Subject):
    """What a model learns from scenes.

    Attributes:
        data: name of the data set that it is tested on.
        samples: plural noun for what a batch has B of.
        auxiliary_weight: of the losses of :attr:`heads`, where there are any; by a cosine, it falls to `fade_to` of it at the
            end.
    """

    data: ClassVar[str]
    samples: ClassVar[str] = "pictures"
    auxiliary_weight: float = 1.0
    fade_to: float = 0.1

    @abstractmethod
    def batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        """Samples `start + rows`, counted from a pair of pictures on, and texts about them."""

    @abstractmethod
    def scores(self, outputs: Sequence[Any], batches: Sequence[Batch]) -> dict[str, float]:
        """How good outputs on held-out batches are, quickly; the test is what `madtp eval` does."""

    def auxiliary(self, part: float) -> float:
        """Weight of auxiliary losses after `part` (0 to 1) of a run."""
        return self.auxiliary_weight * faded(part, self.fade_to)


class Statements(Lesson):
    """Whether statements about pairs of pictures are true; the text's class token says what they are about, too."""

    data, samples = "scenes", "pairs"

    def __init__(self, model: BlipNlvr, texts: int) -> None:
        super().__init__(model, texts)
        self.module = ManyStatements(model)
        self.heads["statements"] = StatementHeads(model.config.text.width)

    def batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        return make_batch(split, seed, first_pair + start + rows.start, len(rows), self.texts)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return _asked(batch)

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        heads = cast(StatementHeads, self.heads["statements"])
        found, accuracy = statement_losses(heads, output[0].float(), output[1], batch)
        metrics: Metrics = {"accuracy": accuracy, **{name: loss.detach() for name, loss in found.items()}}
        return found["task"] + self.auxiliary(part) * (found["count"] + PLACES * found["place"]), metrics

    def scores(self, outputs: Sequence[Any], batches: Sequence[Batch]) -> dict[str, float]:
        right = [o[0].argmax(-1) == batch["labels"].flatten() for o, batch in zip(outputs, batches, strict=True)]
        return {"accuracy": float(torch.cat(right).float().mean())}

    def soft_answers(self, output: Any) -> Tensor:
        return cast(Tensor, output[0])


def _asked(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}


class PictureLesson(Lesson):
    """What a model learns from single pictures."""

    @property
    def tower(self) -> nn.Module:
        """The module that returns vision tokens [B, N, C], class token first."""
        return cast(nn.Module, self.model.visual_encoder)

    def see(self, images: Tensor) -> None:
        """Run the tower, and as little else as possible, on images [B, 3, H, W]."""
        self.model.visual_encoder(images)

    def batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        listed, tensors = draw_batch(seed, split, 2 * first_pair + start + rows.start, len(rows))
        return {**tensors, **self.write(listed)}

    def pick_captions(self, pictures: Sequence[Picture]) -> list[str]:
        """Of each picture S captions, of different orders, S * B in all."""
        chosen = []
        for picture in pictures:
            written = captions(picture.things)
            draws = draws_for(picture.seed, picture.split, picture.index, _ORDER + picture.side)
            chosen += [written[place] for place in draws.some(len(written), self.texts)]
        return chosen

    @abstractmethod
    def write(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """The texts about B pictures."""


def tokens_apart(tokens: Tensor, wanted: Tensor, left: Tensor | None) -> Tensor:
    """One less the cosine between tokens [B, N, C] and those that are wanted, the mean over those left [B, N] (None: all)."""
    apart = 1 - F.cosine_similarity(tokens, wanted, dim=-1)
    return apart.mean() if left is None else (apart * left).sum() / left.sum()


class _Seen(PictureLesson):
    """A lesson whose texts read the tokens of the tower, `image_tokens` of the output: pruned, it follows the dense model's."""

    def followed(self, module: Any, dense: Any, batch: Batch, output: Any, wanted: Any) -> Tensor:
        """Of the image tokens that survive, too."""
        distance = super().followed(module, dense, batch, output, wanted)
        if not isinstance(module, PrunedModel):
            return distance  # tokens of a smaller image, or merged ones, have no counterpart
        left = seen(module, next(path for path, inner in self.module.named_modules() if inner is self.tower))
        return distance + FEATURES * tokens_apart(output.image_tokens, wanted.image_tokens, left)


class _Written(_Seen):
    """A lesson whose answers are words that a decoder writes."""

    target: ClassVar[tuple[str, str]]
    """Ids and mask of what is written, [B, S, T]."""

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        del module, part
        ids, mask = (batch[name].flatten(0, 1) for name in self.target)
        losses, _ = next_token_losses(output.logits.float(), ids, mask)
        loss = losses.sum() / batch["words"]
        return loss, {"task": loss.detach(), "accuracy": self._right(output, batch).float().mean()}

    def scores(self, outputs: Sequence[Any], batches: Sequence[Batch]) -> dict[str, float]:
        right = torch.cat([self._right(output, batch) for output, batch in zip(outputs, batches, strict=True)])
        return {"accuracy": float(right.float().mean())}

    def soft_answers(self, output: Any) -> Tensor:
        return cast(Tensor, output.logits)

    def _right(self, output: Any, batch: Batch) -> Tensor:
        """Which words of all texts are right, given those before them."""
        ids, mask = (batch[name].flatten(0, 1)[:, 1:] for name in self.target)
        return (output.logits[:, :-1].argmax(-1) == ids)[mask.bool()]

    def _spell(self, texts: Sequence[str], first: int) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, S, T]."""
        config = cast(BlipConfig, self.model.config)
        spelled = spell(words_for(config.text.vocabulary, None), texts, first=first, end=config.end_id)
        ids, mask = (part.unflatten(0, (-1, self.texts)) for part in spelled)
        return ids, mask


def _words(mask: Tensor) -> Tensor:
    """How many words are predicted, of texts with mask [B, S, T]: all but the first of each."""
    return (mask[..., 1:] != 0).sum().float()


class Captions(_Written):
    """Captions of pictures, S of the four orders that things can be named in."""

    data = "scenes_captions"
    target = ("input_ids", "attention_mask")

    def __init__(self, model: BlipCaption, texts: int) -> None:
        super().__init__(model, texts)
        self.module = ManyCaptions(model)

    def write(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        ids, mask = self._spell(self.pick_captions(pictures), self.model.config.decode_id)
        return {"input_ids": ids, "attention_mask": mask, "words": _words(mask)}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return _asked(batch)


class Questions(_Written):
    """Questions about pictures, with answers of a word."""

    data = "scenes_questions"
    target = ("answer_ids", "answer_mask")

    def __init__(self, model: BlipVqa, texts: int) -> None:
        super().__init__(model, texts)
        self.module = ManyQuestions(model)

    def write(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        asked = []
        for picture in pictures:
            draws = draws_for(picture.seed, picture.split, picture.index, _QUESTIONS + picture.side)
            asked += [draw_question(picture.census, picture.side, draws) for _ in range(self.texts)]
        config = self.model.config
        ids, mask = self._spell([question.question for question in asked], config.encode_id)
        answer_ids, answer_mask = self._spell([question.answer for question in asked], config.decode_id)
        answers = {"answer_ids": answer_ids, "answer_mask": answer_mask, "words": _words(answer_mask)}
        return {"input_ids": ids, "attention_mask": mask, **answers}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        names = ("images", "input_ids", "attention_mask", "answer_ids", "answer_mask")
        return {name: batch[name] for name in names}

    def _right(self, output: Any, batch: Batch) -> Tensor:
        return output.logits[:, 0].argmax(-1) == batch["answer_ids"].flatten(0, 1)[:, 1]


class _Retrieved(PairSubject, PictureLesson):
    """Pictures and captions that belong together, told by features; the features say what is there, too."""

    data = "scenes_captions"

    def __init__(self, model: Any, embedding: int) -> None:
        super().__init__(model)
        self.heads["contents"] = ContentHeads(embedding)

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        similar = output.scale * output.image_features @ output.text_features.T
        places = torch.arange(len(similar), device=similar.device)
        contrast = (F.cross_entropy(similar.float(), places) + F.cross_entropy(similar.T.float(), places)) / 2
        features = torch.cat([output.image_features, output.text_features])
        content = self.heads["contents"](features, batch["things"].repeat(2, 1))
        metrics: Metrics = {"contrast": contrast.detach(), "content": content.detach()}
        metrics["accuracy"] = (similar.argmax(1) == places).float().mean()
        return contrast + self.auxiliary(part) * content, metrics

    def scores(self, outputs: Sequence[Any], batches: Sequence[Batch]) -> dict[str, float]:
        images, texts = (
            torch.cat([getattr(output, name) for output in outputs]) for name in ("image_features", "text_features")
        )
        places = torch.arange(len(images), device=images.device)
        similar = images @ texts.T
        return {
            "text_r1": float((similar.argmax(1) == places).float().mean()),
            "image_r1": float((similar.argmax(0) == places).float().mean()),
        }


class BlipPairs(_Seen, _Retrieved):
    """Features, and matching of each picture with its caption and with wrong ones."""

    def __init__(self, model: BlipRetrieval) -> None:
        super().__init__(model, model.config.embedding)

    def write(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        config = self.model.config
        words = words_for(config.text.vocabulary, None)
        ids, mask = spell(words, self.pick_captions(pictures), first=config.class_id, end=config.end_id)
        return {"input_ids": ids, "attention_mask": mask}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return _asked(batch)

    def followed(self, module: Any, dense: Any, batch: Batch, output: Any, wanted: Any) -> Tensor:
        """Of what the matching head reads, too."""
        distance = super().followed(module, dense, batch, output, wanted)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return distance + FEATURES * matching_distance(module, dense, output, wanted, ids, mask)

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        total, metrics = super().losses(module, batch, output, part)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        samples = torch.arange(len(ids), device=ids.device)
        matching = matching_loss(cast(Any, module), output, ids, mask, samples)
        return total + matching, metrics | {"matching": matching.detach()}


class ClipPairs(_Retrieved):
    """Features alone."""

    def __init__(self, model: Clip) -> None:
        super().__init__(model, model.config.embedding)

    @property
    def tower(self) -> nn.Module:
        return cast(nn.Module, self.model.visual.transformer)

    def see(self, images: Tensor) -> None:
        self.model.visual(images)

    def write(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        return {"input_ids": clip_texts(self.model.config, None)(self.pick_captions(pictures))}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("images", "input_ids")}


_LESSONS: Mapping[type[nn.Module], Any] = {
    BlipNlvr: Statements,
    BlipCaption: Captions,
    BlipVqa: Questions,
    BlipRetrieval: lambda model, texts: BlipPairs(model),
    Clip: lambda model, texts: ClipPairs(model),
}


def lesson_for(name: str, checkpoint: str | None, texts: int) -> Lesson:
    """The lesson of a model of the zoo, with `texts` about each picture (pairs have one).

    Raises:
        ConfigError: there is none for such a model.
    """
    return lesson_about(zoo.create(name, checkpoint), texts)


def lesson_about(model: nn.Module, texts: int) -> Lesson:
    """The lesson of a model, as :func:`lesson_for`."""
    if type(model) not in _LESSONS:
        known = ", ".join(kind.__name__ for kind in _LESSONS)
        raise ConfigError(f"scenes have no lesson for {type(model).__name__}; there are some for {known}")
    return cast(Lesson, _LESSONS[type(model)](model, texts))
