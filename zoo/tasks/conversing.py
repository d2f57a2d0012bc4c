"""Questions about images, for a language model that goes on from a prompt: :class:`Conversing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from madtp.evaluation.task import Result
from zoo.datasets.records import DataSet, Question
from zoo.llava.conversation import PADDING, Turn, prompts, spoken
from zoo.metrics.answers import vqa_accuracy
from zoo.tasks.one_stage import OneStage

LONGEST = 4
"""Words that an answer may have, with the token that ends it."""


class Writer(Protocol):
    """A model of transformers that writes, dense or rewritten."""

    def generate(
        self,
        *,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        do_sample: bool,
        pad_token_id: int,
    ) -> Tensor:
        """Go on from prompts ``[B, T]`` about images ``[B, 3, H, W]``; returns ids ``[B, T + new]``."""


class Conversing(OneStage):
    """The task, in one stage: itself. The model writes its answers, by the likeliest word.

    Args:
        data: Questions about images.
        device: Device of the model.
        model: The dense model; its configuration is read.
    """

    name = "questions"

    def __init__(self, data: DataSet[Question], device: torch.device, model: Any) -> None:
        self.data = data
        self.device = device
        self.image_tokens: int = model.config.image_seq_length

    def inputs(self, samples: range) -> dict[str, Tensor]:
        """Return images ``[B, 3, H, W]``, prompts ``[B, T]``, padded on the left, and their mask, 1 for a token."""
        items = [self.data[index] for index in samples]
        ids, mask = prompts([[Turn(item.record.question)] for item in items], self.image_tokens)
        images = torch.cat([item.images for item in items])
        given = {"pixel_values": images, "input_ids": ids, "attention_mask": mask}
        return {name: value.to(self.device) for name, value in given.items()}

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        """Return the ``answer`` to each question."""
        del earlier
        inputs, writer = self.inputs(samples), cast(Writer, model)
        written = writer.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, pad_token_id=PADDING)
        answers = written[:, inputs["input_ids"].shape[1] :].tolist()
        return [{"answer": spoken(ids)} for ids in answers]

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        """Return ``vqa_accuracy``, over all questions and by their kind."""
        given, found = [record.answers for record in self.data.records], [r["answer"] for r in results[self.name]]
        scores = {"vqa_accuracy": vqa_accuracy(found, given)}
        kinds = [record.kind for record in self.data.records]
        for kind in sorted({kind for kind in kinds if kind}):
            chosen = [at for at, one in enumerate(kinds) if one == kind]
            scores[f"vqa_accuracy_{kind}"] = vqa_accuracy([found[at] for at in chosen], [given[at] for at in chosen])
        return scores
