"""What models learn from data sets in files, by the losses of the paper: :func:`paper_objective`; one class a task.

Samples are opened elsewhere (``recipes/data_loader.py``), and spelled by the task that ``madtp eval`` runs. Axes: B samples, T
tokens of a text, A answers, L tokens of an answer, W words.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.training.batch_shares import Batch
from zoo.blip.caption import BlipCaption, CaptionOutput
from zoo.blip.losses import SMOOTHING, answer_loss, next_token_losses
from zoo.blip.matching import Matcher, matching_loss
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.retrieval import BlipRetrieval, RetrievalOutput
from zoo.blip.vqa import BlipVqa, VqaOutput
from zoo.clip.model import Clip, ClipOutput
from zoo.datasets.records import CaptionedImage, DataSet, PairStatement, Question, R, Sample, one_caption_each
from zoo.objectives.base import Metrics, ModelT, Objective, OutputT, PairObjective, pair_features
from zoo.objectives.momentum_contrast import DECAY, QUEUE, MomentumContrast
from zoo.tasks.answering import Answering
from zoo.tasks.captioning import Captioning
from zoo.tasks.reasoning import Reasoning
from zoo.tasks.registry import task_of
from zoo.tasks.retrieval import CaptionedImages
from zoo.transforms import swap_sides


@dataclass(frozen=True)
class ContrastSettings:
    """How retrieval is trained; see :class:`zoo.objectives.momentum_contrast.MomentumContrast`.

    Attributes:
        queue: Features of earlier batches to compare with.
        decay: Share of its own weights that the momentum copy keeps in a step.
        alpha: Weight of the copy's similarities in the targets.
        alpha_ramp: Fraction of the run after which ``alpha`` is reached, linearly.
    """

    queue: int = QUEUE
    decay: float = DECAY
    alpha: float = 0.4
    alpha_ramp: float = 0.2


@dataclass(frozen=True)
class OpenedSamples(Generic[R]):
    """Samples that are open, in the form in which a task reads a data set."""

    name: str
    split: str
    samples: Sequence[Sample[R]]

    @property
    def records(self) -> list[R]:
        """The records of all samples."""
        return [sample.record for sample in self.samples]

    def __getitem__(self, place: int) -> Sample[R]:
        return self.samples[place]


class SpellingTask(Protocol):
    """A task that turns samples of its data into arguments of the model."""

    data: Any

    def inputs(self, samples: range) -> Mapping[str, Any]: ...


TaskT = TypeVar("TaskT", bound=SpellingTask)


class PaperObjective(Objective[ModelT, OutputT], Generic[ModelT, OutputT, TaskT, R]):
    """A task and its losses.

    Attributes:
        task: The task as evaluation has it, on the training data; it spells texts.
        arguments: Names of the arguments of the model.
    """

    arguments: ClassVar[tuple[str, ...]] = ("images", "input_ids", "attention_mask")

    def __init__(self, model: ModelT, task: TaskT) -> None:
        super().__init__(model)
        self.task = task

    def training_samples(self, data: DataSet[R]) -> DataSet[R]:
        """Return the data set with one record for each training sample."""
        return data

    def vary(self, sample: Sample[R], draw: float) -> Sample[R]:
        """Return the sample as it is learned this time; ``draw`` is uniform in [0, 1)."""
        del draw
        return sample

    def batch(self, samples: Sequence[Sample[R]]) -> Batch:
        """Return samples as arguments of the model, with the further tensors that the loss needs."""
        opened = OpenedSamples(self.task.data.name, self.task.data.split, samples)
        task = copy.copy(self.task)
        task.data = opened
        arguments = self.encode(task, len(samples))
        return {**arguments, **self.targets(opened.records, arguments)}

    def encode(self, task: TaskT, count: int) -> dict[str, Tensor]:
        """Return the arguments of the model for the first ``count`` samples of a task."""
        return dict(task.inputs(range(count)))

    @abstractmethod
    def targets(self, records: Sequence[R], arguments: Batch) -> dict[str, Tensor]:
        """Return what the loss needs besides the arguments of the model."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.arguments}


AnyPaperObjective: TypeAlias = PaperObjective[Any, Any, Any, Any]


class ReasoningObjective(PaperObjective[BlipNlvr, Tensor, Reasoning, PairStatement]):
    """True or false: cross-entropy. Left and right are exchanged in half of the samples."""

    def vary(self, sample: Sample[PairStatement], draw: float) -> Sample[PairStatement]:
        return swap_sides(sample) if draw < 0.5 else sample

    def targets(self, records: Sequence[PairStatement], arguments: Batch) -> dict[str, Tensor]:
        return {"labels": torch.tensor([record.label for record in records])}

    def logits(self, output: Tensor) -> Tensor:
        return output

    def losses(self, module: nn.Module, batch: Batch, output: Tensor, progress: float) -> tuple[Tensor, Metrics]:
        loss = F.cross_entropy(output.float(), batch["labels"])
        return loss, {"task": loss.detach(), "accuracy": (output.argmax(-1) == batch["labels"]).float().mean()}


def _decoder_logits(output: CaptionOutput | VqaOutput) -> Tensor:
    if output.logits is None:
        raise ConfigError("the model returned no logits; call it with the texts that its decoder is to predict.")
    return output.logits


class CaptionObjective(PaperObjective[BlipCaption, CaptionOutput, Captioning, CaptionedImage]):
    """Each word after the prompt given those before it, with smoothed targets."""

    def training_samples(self, data: DataSet[CaptionedImage]) -> DataSet[CaptionedImage]:
        return one_caption_each(data)

    def targets(self, records: Sequence[CaptionedImage], arguments: Batch) -> dict[str, Tensor]:
        return {"words": (arguments["attention_mask"].sum() - len(records) * self.task.prompt_tokens).float()}

    def logits(self, output: CaptionOutput) -> Tensor:
        return _decoder_logits(output)

    def losses(self, module: nn.Module, batch: Batch, output: CaptionOutput, progress: float) -> tuple[Tensor, Metrics]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        prompt = self.task.prompt_tokens
        losses, _ = next_token_losses(self.logits(output).float(), ids, mask, prompt=prompt, smoothing=SMOOTHING)
        loss = losses.sum() / batch["words"]
        return loss, {"task": loss.detach()}


class QuestionObjective(PaperObjective[BlipVqa, VqaOutput, Answering, Question]):
    """All answers to each question, weighted by how many people gave them."""

    arguments = ("images", "input_ids", "attention_mask", "answer_ids", "answer_mask", "owners")

    def encode(self, task: Answering, count: int) -> dict[str, Tensor]:
        return dict(task.all_answers(range(count)))

    def targets(self, records: Sequence[Question], arguments: Batch) -> dict[str, Tensor]:
        return {"weights": torch.tensor([w for record in records for w in record.weighted_answers().values()])}

    def logits(self, output: VqaOutput) -> Tensor:
        return _decoder_logits(output)

    def losses(self, module: nn.Module, batch: Batch, output: VqaOutput, progress: float) -> tuple[Tensor, Metrics]:
        ids, mask, weights = batch["answer_ids"], batch["answer_mask"], batch["weights"]
        loss = answer_loss(self.logits(output).float(), ids, mask, weights, len(batch["images"]))
        return loss, {"task": loss.detach()}


class RetrievalObjective(
    PairObjective[BlipRetrieval | Clip, RetrievalOutput | ClipOutput],
    PaperObjective[BlipRetrieval | Clip, RetrievalOutput | ClipOutput, CaptionedImages, CaptionedImage],
):
    """Images and captions, compared with the momentum copy's features of earlier batches, and matched where the model can."""

    def __init__(self, model: BlipRetrieval | Clip, task: CaptionedImages, contrast: ContrastSettings) -> None:
        super().__init__(model, task)
        self.contrast = contrast
        self.numbers = {record.images[0]: number for number, record in enumerate(task.data.records)}

    def training_samples(self, data: DataSet[CaptionedImage]) -> DataSet[CaptionedImage]:
        return one_caption_each(data)

    def attach(self, pruned: PrunedModel) -> None:
        self.heads["contrast"] = MomentumContrast(
            pruned, self.model.config.embedding, queue=self.contrast.queue, decay=self.contrast.decay
        )

    def targets(self, records: Sequence[CaptionedImage], arguments: Batch) -> dict[str, Tensor]:
        return {"samples": torch.tensor([self.numbers[record.images[0]] for record in records])}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.arguments if name in batch}

    def losses(
        self, module: nn.Module, batch: Batch, output: RetrievalOutput | ClipOutput, progress: float
    ) -> tuple[Tensor, Metrics]:
        contrast = cast(MomentumContrast, self.heads["contrast"])
        follower = cast(PrunedModel, contrast.follower)
        follower.madtp.gain = cast(PrunedModel, module).madtp.gain
        texts = {name: value for name, value in self.inputs(batch).items() if name != "images"}
        alpha = self.contrast.alpha * min(1.0, progress / self.contrast.alpha_ramp)
        loss: Tensor = contrast(
            pair_features(output), batch["images"], texts=texts, samples=batch["samples"], alpha=alpha
        )
        metrics: Metrics = {"contrast": loss.detach()}
        if isinstance(output, RetrievalOutput):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            matching = matching_loss(cast(Matcher, module), output, ids, mask, batch["samples"])
            loss, metrics["matching"] = loss + matching, matching.detach()
        return loss, metrics


_TRAINABLE: Mapping[str, type[AnyPaperObjective]] = {
    "reasoning": ReasoningObjective,
    "captioning": CaptionObjective,
    "questions": QuestionObjective,
}


def paper_objective(name: str, model: nn.Module, task: Any, contrast: ContrastSettings) -> AnyPaperObjective:
    """Return the objective of a model of the zoo.

    Args:
        name: Name of the model in the zoo.
        model: The dense model.
        task: The task of the model on the training data, see :func:`zoo.tasks.build_task`.
        contrast: How retrieval is trained.

    Raises:
        ConfigError: There is no objective for the model's task.
    """
    kind = task_of(name)
    if kind == "retrieval":
        return RetrievalObjective(cast("BlipRetrieval | Clip", model), task, contrast)
    if kind not in _TRAINABLE:
        raise ConfigError(f"there is no objective for {name}, which is for {kind}.")
    return _TRAINABLE[kind](model, task)
