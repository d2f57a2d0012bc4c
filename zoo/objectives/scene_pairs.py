"""Objectives on pictures and captions that belong together: :class:`BlipPairObjective` and :class:`ClipPairObjective`.

Axes: B pictures with a caption each, T tokens of a caption, N vision tokens, E width of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import DataError
from madtp.training.batch_shares import Batch
from zoo.blip.matching import Matcher, matching_distance, matching_loss
from zoo.blip.retrieval import BlipRetrieval, RetrievalOutput
from zoo.clip.model import Clip, ClipOutput
from zoo.objectives.auxiliary_heads import ContentHeads
from zoo.objectives.base import FEATURE_WEIGHT, Metrics, PairObjective, PairOutputT, pair_features
from zoo.objectives.scene_base import PictureObjective, text_inputs
from zoo.objectives.scene_batches import Picture
from zoo.tasks.encode_text import clip_texts, spell
from zoo.tasks.vocabulary import words_for

PairModelT = TypeVar("PairModelT", bound=BlipRetrieval | Clip)


class _ScenePairObjective(PairObjective[PairModelT, PairOutputT], PictureObjective[PairModelT, PairOutputT]):
    """Features of pictures and captions, compared within a batch; a head reads off them what a picture holds."""

    data = "scenes_captions"

    def __init__(self, model: PairModelT) -> None:
        super().__init__(model, 1, model.config.vision.width)
        self.contents = ContentHeads(model.config.embedding)
        self.heads["contents"] = self.contents

    def losses(self, module: nn.Module, batch: Batch, output: PairOutputT, progress: float) -> tuple[Tensor, Metrics]:
        found = pair_features(output)
        similar = found.similarities()
        places = torch.arange(len(similar), device=similar.device)
        contrast = (F.cross_entropy(similar.float(), places) + F.cross_entropy(similar.T.float(), places)) / 2
        features = torch.cat([found.image_features, found.text_features])
        content: Tensor = self.contents(features, batch["things"].repeat(2, 1))
        metrics: Metrics = {"contrast": contrast.detach(), "content": content.detach()}
        metrics["accuracy"] = (similar.argmax(1) == places).float().mean()
        return contrast + self.auxiliary(progress) * content, metrics

    def scores(self, outputs: Sequence[PairOutputT], batches: Sequence[Batch]) -> dict[str, float]:
        features = [pair_features(output) for output in outputs]
        images, texts = torch.cat([f.image_features for f in features]), torch.cat([f.text_features for f in features])
        places = torch.arange(len(images), device=images.device)
        similar = images @ texts.T
        return {
            "text_r1": float((similar.argmax(1) == places).float().mean()),
            "image_r1": float((similar.argmax(0) == places).float().mean()),
        }


class BlipPairObjective(_ScenePairObjective[BlipRetrieval, RetrievalOutput]):
    """Features, and matching of each picture with its caption and with wrong ones."""

    def encode_texts(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        config = self.model.config
        words = words_for(config.text.vocabulary, None)
        ids, mask = spell(words, self.pick_captions(pictures, self.texts), first=config.class_id, end=config.end_id)
        return {"input_ids": ids, "attention_mask": mask}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return text_inputs(batch)

    def distance_to_teacher(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, *, output: RetrievalOutput, target: RetrievalOutput
    ) -> Tensor:
        """Return the distance of features, of image tokens that survive, and of what the matching head reads."""
        distance = super().distance_to_teacher(student, teacher, batch, output=output, target=target)
        tokens = self.image_token_distance(student, _image_tokens(output), _image_tokens(target))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        matching = matching_distance(cast(Matcher, student), cast(Matcher, teacher), output, target, ids, mask)
        return distance + tokens + FEATURE_WEIGHT * matching

    def losses(
        self, module: nn.Module, batch: Batch, output: RetrievalOutput, progress: float
    ) -> tuple[Tensor, Metrics]:
        total, metrics = super().losses(module, batch, output, progress)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        samples = torch.arange(len(ids), device=ids.device)
        matching = matching_loss(cast(Matcher, module), output, ids, mask, samples)
        return total + matching, metrics | {"matching": matching.detach()}


def _image_tokens(output: RetrievalOutput) -> Tensor:
    if output.image_tokens is None:
        raise DataError("the model returned no image_tokens; call it with images.")
    return output.image_tokens


class ClipPairObjective(_ScenePairObjective[Clip, ClipOutput]):
    """Features alone."""

    @property
    def tower(self) -> nn.Module:
        return self.model.visual.transformer

    def encode_images(self, images: Tensor) -> None:
        self.model.visual(images)

    def encode_texts(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        return {"input_ids": clip_texts(self.model.config, None)(self.pick_captions(pictures, self.texts))}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("images", "input_ids")}
