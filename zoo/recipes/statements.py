"""Statements about pairs of scenes as a lesson, by the losses of `compress_nlvr_scenes.py`: for controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from madtp.training.parts import Batch
from zoo.recipes.auxiliary import StatementHeads
from zoo.recipes.compress_nlvr_scenes import Settings, answer_loss
from zoo.recipes.lessons import Lesson
from zoo.recipes.many import ManyStatements
from zoo.recipes.nlvr_scenes import make_batch
from zoo.recipes.pictures import Picture
from zoo.recipes.subject import Metrics


class Statements(Lesson):
    """True or false, with auxiliary losses; a sample is a pair."""

    data, metric = "scenes", "accuracy"

    def __init__(self, model: Any, settings: Settings) -> None:
        super().__init__(model, settings.statements_per_pair)
        self.module = ManyStatements(model)
        self.settings = settings
        self.heads["statements"] = StatementHeads(model.config.text.width)

    def batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        return make_batch(split, seed, first_pair + start + rows.start, len(rows), self.texts)

    def write(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        raise NotImplementedError("statements are about pairs")

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        heads = cast(StatementHeads, self.heads["statements"])
        return answer_loss(heads, output[0].float(), output[1], batch, self.settings, part)

    def scores(self, outputs: Sequence[Any], batches: Sequence[Batch]) -> dict[str, float]:
        right = [o[0].argmax(-1) == batch["labels"].flatten() for o, batch in zip(outputs, batches, strict=True)]
        return {"accuracy": float(torch.cat(right).float().mean())}

    def soft_answers(self, output: Any) -> Tensor:
        return cast(Tensor, output[0])
