"""What models learn from data sets in files, and by which losses, as the paper has them: :func:`course_for`; one class a task.

A course is a :class:`zoo.objectives.base.Subject`; its batches are made of samples that were opened elsewhere
(`recipes/data_loader.py`), and spelled by the task that `madtp eval` runs. Axes: B samples, T tokens of a text, A
answers, L of an answer.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.training.batch_shares import Batch
from zoo.blip.losses import SMOOTHING, answer_loss, next_token_losses
from zoo.blip.matching import matching_loss
from zoo.datasets.records import DataSet, Sample, one_caption_each
from zoo.objectives.base import Metrics, PairSubject, Subject
from zoo.objectives.momentum_contrast import DECAY, QUEUE, MomentumContrast
from zoo.tasks.registry import task_of
from zoo.transforms import turned_round


@dataclass(frozen=True)
class Contrast:
    """How retrieval is trained: see :class:`zoo.objectives.momentum_contrast.MomentumContrast`.

    `alpha`, the weight of the copy's similarities in the targets, is reached after `alpha_ramp` of the run, linearly.
    """

    queue: int = QUEUE
    decay: float = DECAY
    alpha: float = 0.4
    alpha_ramp: float = 0.2


@dataclass(frozen=True)
class Opened:
    """Samples that are open, as a task reads a data set."""

    name: str
    split: str
    samples: Sequence[Sample[Any]]

    @property
    def records(self) -> list[Any]:
        """Of all samples."""
        return [sample.record for sample in self.samples]

    def __getitem__(self, place: int) -> Sample[Any]:
        return self.samples[place]


class Course(Subject):
    """A task and its losses.

    Attributes:
        task: of the model, as evaluation has it; spells texts.
        arguments: names of the arguments of the model.
    """

    arguments: ClassVar[tuple[str, ...]] = ("images", "input_ids", "attention_mask")

    def __init__(self, model: Any, task: Any) -> None:
        super().__init__(model)
        self.task = task

    @staticmethod
    def samples(data: DataSet[Any]) -> DataSet[Any]:
        """The data set as training takes it."""
        return data

    def vary(self, sample: Sample[Any], chance: float) -> Sample[Any]:
        """A sample as it is learned this time; `chance` lies in [0, 1)."""
        del chance
        return sample

    def batch(self, samples: Sequence[Sample[Any]]) -> Batch:
        """Samples as arguments of the model, and what the loss wants besides."""
        opened = Opened(self.task.data.name, self.task.data.split, samples)
        task = copy.copy(self.task)
        task.data = opened
        arguments = self.arguments_of(task, len(samples))
        return {**arguments, **self.targets(opened.records, arguments)}

    def arguments_of(self, task: Any, count: int) -> dict[str, Tensor]:
        """Arguments of the model."""
        return cast("dict[str, Tensor]", task.inputs(range(count)))

    @abstractmethod
    def targets(self, records: Sequence[Any], arguments: Batch) -> dict[str, Tensor]:
        """What the loss wants besides the arguments of the model."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.arguments}


class ReasoningCourse(Course):
    """True or false: cross-entropy. Half of the statements are turned round."""

    def vary(self, sample: Sample[Any], chance: float) -> Sample[Any]:
        return turned_round(sample) if chance < 0.5 else sample

    def targets(self, records: Sequence[Any], arguments: Batch) -> dict[str, Tensor]:
        return {"labels": torch.tensor([record.label for record in records])}

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        loss = F.cross_entropy(output.float(), batch["labels"])
        return loss, {"task": loss.detach(), "accuracy": (output.argmax(-1) == batch["labels"]).float().mean()}


class _Written(Course):
    """Texts that a decoder writes; the module returns its logits."""

    def soft_answers(self, output: Any) -> Tensor:
        return cast(Tensor, output.logits)


class CaptionCourse(_Written):
    """Each word given those before it, smoothed, behind the prompt."""

    @staticmethod
    def samples(data: DataSet[Any]) -> DataSet[Any]:
        return one_caption_each(data)

    def targets(self, records: Sequence[Any], arguments: Batch) -> dict[str, Tensor]:
        return {"words": (arguments["attention_mask"].sum() - len(records) * self.task.prompt_tokens).float()}

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        prompt = self.task.prompt_tokens
        losses, _ = next_token_losses(output.logits.float(), ids, mask, prompt=prompt, smoothing=SMOOTHING)
        loss = losses.sum() / batch["words"]
        return loss, {"task": loss.detach()}


class QuestionCourse(_Written):
    """All answers to each question, weighed by how many people gave them."""

    arguments = ("images", "input_ids", "attention_mask", "answer_ids", "answer_mask", "owners")

    def arguments_of(self, task: Any, count: int) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", task.all_answers(range(count)))

    def targets(self, records: Sequence[Any], arguments: Batch) -> dict[str, Tensor]:
        return {"weights": torch.tensor([w for record in records for w in record.weighted_answers().values()])}

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        ids, mask, weights = batch["answer_ids"], batch["answer_mask"], batch["weights"]
        loss = answer_loss(output.logits.float(), ids, mask, weights, len(batch["images"]))
        return loss, {"task": loss.detach()}


class RetrievalCourse(PairSubject, Course):
    """Images and captions, compared with the momentum copy's features of earlier batches, and matched where the model can."""

    def __init__(self, model: Any, task: Any, contrast: Contrast) -> None:
        super().__init__(model, task)
        self.contrast = contrast
        self.numbers = {record.images[0]: number for number, record in enumerate(task.data.records)}
        self.matches = hasattr(model, "itm_head")

    @staticmethod
    def samples(data: DataSet[Any]) -> DataSet[Any]:
        return one_caption_each(data)

    def attach(self, pruned: PrunedModel) -> None:
        self.heads["contrast"] = MomentumContrast(
            pruned, self.model.config.embedding, queue=self.contrast.queue, decay=self.contrast.decay
        )

    def targets(self, records: Sequence[Any], arguments: Batch) -> dict[str, Tensor]:
        return {"samples": torch.tensor([self.numbers[record.images[0]] for record in records])}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.arguments if name in batch}

    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        contrast = cast(MomentumContrast, self.heads["contrast"])
        follower = cast(PrunedModel, contrast.follower)
        follower.gain = cast(PrunedModel, module).gain
        texts = {name: value for name, value in self.inputs(batch).items() if name != "images"}
        alpha = self.contrast.alpha * min(1.0, part / self.contrast.alpha_ramp)
        loss = contrast(output, batch["images"], texts, batch["samples"], alpha)
        metrics: Metrics = {"contrast": loss.detach()}
        if self.matches:
            matching = matching_loss(
                cast(Any, module), output, batch["input_ids"], batch["attention_mask"], batch["samples"]
            )
            loss, metrics["matching"] = loss + matching, matching.detach()
        return loss, metrics


def course_for(name: str, model: Any, task: Any, contrast: Contrast) -> Course:
    """The course of a model of the zoo.

    Args:
        name: in the zoo.
        model: dense.
        task: of the model on the training data, see :func:`zoo.tasks.build_task`.
        contrast: for retrieval.
    """
    kind = task_of(name)
    courses: dict[str, type[Any]] = {
        "reasoning": ReasoningCourse,
        "captioning": CaptionCourse,
        "questions": QuestionCourse,
    }
    if kind == "retrieval":
        return RetrievalCourse(model, task, contrast)
    if kind not in courses:
        raise ConfigError(f"there is no course for {name}, which is for {kind}.")
    return cast(Course, courses[kind](model, task))
