"""Is a statement about two images true? :class:`Reasoning`, for BLIP-NLVR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from madtp.evaluation.task import Result
from zoo.datasets.records import DataSet, PairStatement
from zoo.metrics import accuracy, accuracy_by_kind
from zoo.tasks.one_stage import OneStage
from zoo.tasks.vocabulary import Words
from zoo.transforms.texts import STATEMENT_WORDS, clean_caption


class Reasoning(OneStage):
    """The task, in one stage: itself."""

    name = "reasoning"

    def __init__(self, data: DataSet[PairStatement], words: Words, device: torch.device) -> None:
        self.data = data
        self.words = words
        self.device = device

    def inputs(self, samples: range) -> dict[str, Tensor]:
        """Return image pairs ``[B, 2, 3, H, W]``, statements ``[B, T]`` and their mask."""
        items = [self.data[index] for index in samples]
        texts = [item.record.statement for item in items]
        ids, mask = self.words.encode(
            [clean_caption(t, STATEMENT_WORDS) for t in texts] if self.words.cleaned else texts
        )
        images = torch.stack([item.images for item in items])
        return {
            name: value.to(self.device)
            for name, value in (("images", images), ("input_ids", ids), ("attention_mask", mask))
        }

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        """Return the ``answer``, 1 for true, to each sample."""
        del earlier
        logits: Tensor = model(**self.inputs(samples))
        return [{"answer": answer} for answer in logits.argmax(-1).tolist()]

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        """Return ``accuracy`` and, where kinds of statement are known, ``accuracy/KIND`` of each."""
        answers = [result["answer"] for result in results[self.name]]
        labels = [record.label for record in self.data.records]
        kinds = [record.kind for record in self.data.records]
        by_kind = accuracy_by_kind(answers, labels, kinds) if any(kinds) else {}
        return {"accuracy": accuracy(answers, labels), **{f"accuracy/{kind}": share for kind, share in by_kind.items()}}
