"""What does an image show? :class:`Captioning`, for BLIP's captioning model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from madtp.evaluation.task import Result
from zoo.blip.caption import BlipCaption
from zoo.blip.decoding import Beams, Captioner, write_captions
from zoo.datasets.records import CaptionedImage, DataSet
from zoo.metrics.captions import caption_metrics
from zoo.tasks.encode_text import CAPTION_TOKENS, spell
from zoo.tasks.one_stage import OneStage
from zoo.tasks.vocabulary import Words
from zoo.transforms.texts import clean_caption

PROMPT = "a picture of"
"""The words with which the published model begins every caption."""


class Captioning(OneStage):
    """The task, in one stage: itself.

    Args:
        data: Images with captions.
        words: Spells captions.
        device: Device of the model.
        model: The dense model; its special tokens are read.
    """

    name = "captioning"

    def __init__(self, data: DataSet[CaptionedImage], words: Words, device: torch.device, model: BlipCaption) -> None:
        self.data = data
        self.words = words
        self.device = device
        self.config = model.config
        # The vocabulary of scenes has no words for the prompt, and captions of scenes may be short.
        self.prompt = PROMPT if words.cleaned else ""
        self.beams = None if words.cleaned else Beams(max_length=min(30, model.config.text.positions))

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in front of a caption that are given, [DEC] included."""
        return self._spell([self.prompt])[0].shape[1] - 1

    def inputs(self, samples: range) -> dict[str, Tensor]:
        """Return images ``[B, 3, H, W]`` with the first caption of each, ids and mask ``[B, T]``."""
        captions = [self.data.records[index].captions[0] for index in samples]
        if self.words.cleaned:
            captions = [clean_caption(caption) for caption in captions]
        ids, mask = self._spell([f"{self.prompt} {caption}".strip() for caption in captions])
        return {"images": self._images(samples), "input_ids": ids, "attention_mask": mask}

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        """Return the ``caption`` that the model writes about each image."""
        del earlier
        prompt = self._spell([self.prompt])[0][0, :-1]
        written = write_captions(cast(Captioner, model), self._images(samples), prompt, self.beams)
        return [{"caption": self.words.decode(ids.tolist())} for ids in written]

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        """Return BLEU and CIDEr, see :func:`zoo.metrics.captions.caption_metrics`."""
        written = [result["caption"] for result in results[self.name]]
        return caption_metrics(written, [record.captions for record in self.data.records])

    def _images(self, samples: range) -> Tensor:
        return torch.cat([self.data[index].images for index in samples]).to(self.device)

    def _spell(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        limit = min(CAPTION_TOKENS, self.config.text.positions)
        ids, mask = spell(self.words, texts, first=self.config.decode_id, end=self.config.end_id, limit=limit)
        return ids.to(self.device), mask.to(self.device)
