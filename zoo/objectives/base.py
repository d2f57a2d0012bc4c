"""What can be compressed: :class:`Subject`, a model with a task to learn; and what all such recipes have in common.

`scenes.py` has subjects that learn from scenes, `paper.py` those that learn from data sets in files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

import madtp
from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.training.attention_kernels import inference_kernels
from madtp.training.batch_shares import Batch
from madtp.training.compression import Budget, distillation_loss, pruning_metrics

Metrics = dict[str, float | Tensor]


class Subject(ABC):
    """A model with a task.

    Attributes:
        model: of the zoo.
        module: what is trained or rewritten, called with :meth:`inputs`; the model, or one around it whose parameters are
            `model.*`.
        texts: how many texts a call has for each image, or pair; one text is what MACs are told of.
        heads: what else is trained, and thrown away afterwards.
    """

    def __init__(self, model: Any, texts: int = 1) -> None:
        self.model = model
        self.module: nn.Module = model
        self.texts = texts
        self.heads = nn.ModuleDict()

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Of a batch, the arguments of :attr:`module`."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Batch, output: Any, part: float) -> tuple[Tensor, Metrics]:
        """The loss and metrics.

        Args:
            module: :attr:`module`, dense or pruned; it may be called again.
            batch: the whole one.
            output: what `module` returned for its :meth:`inputs`.
            part: how much of the run is done, 0 to 1.
        """

    def attach(self, pruned: PrunedModel) -> None:
        """Told of the rewritten :attr:`module` before training starts; here nothing follows from it."""
        del pruned

    def soft_answers(self, output: Any) -> Tensor:
        """Logits [..., W] in which a pruned model is to follow the dense one."""
        return cast(Tensor, output)

    def certainty(self, output: Any) -> Tensor:
        """How sure the model is of its answers, a scalar: what alignment tokens are taught by."""
        best = self.soft_answers(output).float().topk(2, dim=-1).values
        return (best[..., 0] - best[..., 1]).sum()

    def distillation(self, module: Any, dense: nn.Module, batch: Batch, output: Any) -> Tensor:
        """How far a module is from the dense one on a batch, a scalar.

        Args:
            module: follows, and may be called again.
            dense: is followed.
            batch: the whole one.
            output: what `module` returned for its inputs, in its last call.
        """
        with inference_kernels():
            wanted = dense(**self.inputs(batch))
        return self.followed(module, dense, batch, output, wanted)

    def followed(self, module: Any, dense: Any, batch: Batch, output: Any, wanted: Any) -> Tensor:
        """As :meth:`distillation`, where the dense module returned `wanted`; here the distance of outputs is all."""
        del module, dense, batch
        return self.distance(output, wanted)

    def distance(self, output: Any, wanted: Any) -> Tensor:
        """How far outputs are from those of the dense model, a scalar."""
        return distillation_loss(self.soft_answers(output).flatten(0, -2), self.soft_answers(wanted).flatten(0, -2))

    def macs(self, pruned: PrunedModel) -> tuple[float, float]:
        """MACs of the last forward as one text about one image costs them: pruned, dense."""
        found = []
        for by_path in (pruned.macs_by_module(), pruned.macs_by_module("all")):
            vision = sum(n for path, n in by_path.items() if "visual" in path)  # sites of these towers, too
            found.append(vision + (sum(by_path.values()) - vision) / self.texts)
        return found[0], found[1]


FEATURES = 10.0
"""Weight of features that point elsewhere than the dense model's, beside the contrastive loss."""


class PairSubject(Subject):
    """Images and texts that belong together, told by features of length 1."""

    def soft_answers(self, output: Any) -> Tensor:
        return cast(Tensor, output.scale * output.image_features @ output.text_features.T)

    def certainty(self, output: Any) -> Tensor:
        """How alike images and their texts are."""
        return cast(Tensor, (output.image_features * output.text_features).sum())

    def distance(self, output: Any, wanted: Any) -> Tensor:
        """One less the cosine between features and those of the dense model: similarities within a batch say far less."""
        pairs = ((output.image_features, wanted.image_features), (output.text_features, wanted.text_features))
        return FEATURES * torch.stack([(1 - (own * other).sum(-1)).mean() for own, other in pairs]).sum()


@dataclass(frozen=True)
class CompressionSettings:
    """Settings of every recipe that compresses.

    Attributes:
        reduction: fraction of the dense MACs to save.
        model, checkpoint: zoo name and weights to start from (a path or a shipped name).
        start_reduction, ramp, rate: see :class:`madtp.training.compression.Budget`.
        alignment_weight: of the alignment loss, where both towers are pruned.
        distillation: weight of the divergence from the dense model's answers; 0 leaves the dense model out.
        teaching_samples, teaching_steps: before the first step the alignment tokens are taught (`madtp.teach`) on so many
            training samples; 0 steps leave that out.
        teach_every: they are taught anew after so many steps each, as the streams that they score move; 0 for never.
        pruning: fields of `PruningConfig`.
    """

    reduction: float = 0.8
    model: str = ""
    checkpoint: str | None = None
    start_reduction: float = 0.3
    ramp: float = 0.4
    rate: float = 0.03
    alignment_weight: float = 0.1
    distillation: float = 0.0
    teaching_samples: int = 256
    teaching_steps: int = 200
    teach_every: int = 200
    pruning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> Budget:
        """How far to prune, and how fast to get there."""
        return Budget(self.reduction, self.start_reduction, self.ramp, self.rate)

    @property
    def taught(self) -> bool:
        """Whether alignment tokens are taught at all."""
        return self.teaching_steps > 0 and PruningConfig.from_dict(dict(self.pruning)).alignment

    def teaches_at(self, step: int) -> bool:
        """Whether they are taught before this step."""
        return self.taught and (step % self.teach_every == 0 if self.teach_every else step == 0)

    def config(self, seed: int) -> PruningConfig:
        """How to rewrite."""
        return PruningConfig.from_dict({"seed": seed, **self.pruning})


def compression_loss(
    subject: Subject,
    pruned: PrunedModel,
    dense: nn.Module | None,
    batch: Batch,
    settings: CompressionSettings,
    part: float,
) -> tuple[Tensor, Metrics]:
    """Task loss, alignment loss and distillation of a batch, and what steering needs.

    Args:
        subject: says what the task is.
        pruned: learns it.
        dense: is followed; None for no distillation.
        batch: of the subject.
        settings: weights.
        part: how much of the run is done, 0 to 1.
    """
    inputs = subject.inputs(batch)
    output = pruned(**inputs)
    # A subject may call the model again; this is the call whose MACs and alignment count.
    metrics: Metrics = dict(pruning_metrics(pruned, subject.macs(pruned)))
    alignment = pruned.alignment_loss() if settings.alignment_weight and _aligned(pruned) else None
    distance = None if dense is None else subject.distillation(pruned, dense, batch, output)
    total, found = subject.losses(pruned, batch, output, part)
    metrics = found | metrics
    if alignment is not None:
        total = total + settings.alignment_weight * alignment
        metrics["align"] = alignment.detach()
    if distance is not None:
        total = total + settings.distillation * distance
        metrics["distil"] = distance.detach()
    return total, metrics


def _aligned(pruned: PrunedModel) -> bool:
    """Whether both towers are pruned by guidance, so that there is something to align."""
    return pruned.config.alignment and len({site.modality for site in pruned.report.sites}) > 1


def deploy(subject: Subject, pruned: PrunedModel, inputs: Mapping[str, Any]) -> PrunedModel:
    """The trained model rewritten for calls of one text an image, with the trained additions.

    Args:
        subject: its model is rewritten.
        pruned: the trained module.
        inputs: example arguments of the model.
    """
    if subject.module is subject.model:
        return pruned.eval()
    fresh = madtp.rewrite(subject.model.eval(), dict(inputs), config=pruned.config)
    trained = {
        name.replace("sites.model_", "sites.", 1): value
        for name, value in pruned.state_dict().items()
        if name.startswith("madtp.")
    }
    missing, unexpected = fresh.load_state_dict(trained, strict=False)
    if unexpected or any(name.startswith("madtp.") for name in missing):
        raise ConfigError(f"the sites of the trained and the deployed model differ: {unexpected[:3]}")
    fresh.gain, fresh.temperature = pruned.gain, pruned.temperature
    return fresh.eval()
