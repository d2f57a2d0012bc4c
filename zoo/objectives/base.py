"""What a model learns: :class:`Objective`, the interface between recipes and tasks.

``scenes.py`` has objectives on scenes, ``paper.py`` those on data sets in files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from madtp.errors import DataError
from madtp.pruned import PrunedModel
from madtp.training.attention_kernels import inference_kernels
from madtp.training.batch_shares import Batch
from madtp.training.compression import distillation_loss

Metrics = dict[str, float | Tensor]
ModelT = TypeVar("ModelT", bound=nn.Module)
OutputT = TypeVar("OutputT")

FEATURE_WEIGHT = 10.0
"""Weight of the distance between features and those of the teacher, relative to the contrastive loss."""


class Objective(ABC, Generic[ModelT, OutputT]):
    """A model with a task to learn; ``OutputT`` is what :attr:`module` returns.

    Attributes:
        model: The model, from the zoo.
        module: What is trained or rewritten, called with :meth:`inputs`. It is the model, or a wrapper whose parameters are
            ``model.*``.
        texts: How many texts a call has for each image or pair. MACs are reported for one text.
        heads: Further modules that are trained and discarded afterwards.
    """

    module: nn.Module

    def __init__(self, model: ModelT, texts: int = 1) -> None:
        self.model = model
        self.module = model
        self.texts = texts
        self.heads = nn.ModuleDict()

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the arguments of :attr:`module` for a batch."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Batch, output: OutputT, progress: float) -> tuple[Tensor, Metrics]:
        """Return the loss, a scalar, and metrics.

        Args:
            module: :attr:`module`, dense or pruned. It may be called again.
            batch: The whole batch.
            output: What ``module`` returned for the batch's :meth:`inputs`.
            progress: Fraction of the run that is done, 0 to 1.
        """

    @abstractmethod
    def logits(self, output: OutputT) -> Tensor:
        """Return the logits ``[..., W]`` in which a student follows its teacher."""

    def attach(self, pruned: PrunedModel) -> None:
        """Prepare for training the rewritten :attr:`module`. Called once, before training starts."""
        del pruned

    def certainty(self, output: OutputT) -> Tensor:
        """Return how sure the model is of its answers, a scalar: the gradient of it teaches the alignment tokens."""
        best = self.logits(output).float().topk(2, dim=-1).values
        return (best[..., 0] - best[..., 1]).sum()

    def distillation(self, student: nn.Module, teacher: nn.Module, batch: Batch, output: OutputT) -> Tensor:
        """Return how far the student is from the teacher on a batch, a scalar.

        Args:
            student: The module that is trained. It may be called again.
            teacher: The dense module.
            batch: The whole batch.
            output: What the student returned in its last call, for the batch's :meth:`inputs`.
        """
        with inference_kernels():
            target: OutputT = teacher(**self.inputs(batch))
        return self.distance_to_teacher(student, teacher, batch, output=output, target=target)

    def distance_to_teacher(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, *, output: OutputT, target: OutputT
    ) -> Tensor:
        """Return the result of :meth:`distillation` where the teacher returned ``target``: the distance of outputs."""
        del student, teacher, batch
        return self.distance(output, target)

    def distance(self, output: OutputT, target: OutputT) -> Tensor:
        """Return how far outputs are from those of the teacher, a scalar: the distillation_loss of their logits."""
        return distillation_loss(self.logits(output).flatten(0, -2), self.logits(target).flatten(0, -2))

    def macs(self, pruned: PrunedModel) -> tuple[float, float]:
        """Return the MACs of the last forward, pruned and dense, for one text about one image."""
        return self._macs_of_one_text(pruned.madtp.macs_by_module()), self._macs_of_one_text(
            pruned.madtp.macs_by_module("all")
        )

    def _macs_of_one_text(self, by_path: dict[str, float]) -> float:
        # Paths of the vision tower's sites hold "visual", too; all else runs once for each text.
        vision = sum(macs for path, macs in by_path.items() if "visual" in path)
        return vision + (sum(by_path.values()) - vision) / self.texts


AnyObjective: TypeAlias = Objective[Any, Any]
"""An objective of whatever model and output."""


class PairOutput(Protocol):
    """What models of image-text pairs return; features are None where the arguments for them were left out."""

    @property
    def image_features(self) -> Tensor | None: ...

    @property
    def text_features(self) -> Tensor | None: ...

    @property
    def scale(self) -> Tensor: ...


class PairFeatures(NamedTuple):
    """Features of images and of texts ``[B, E]``, of length 1, and the factor on their products, a scalar."""

    image_features: Tensor
    text_features: Tensor
    scale: Tensor

    def similarities(self) -> Tensor:
        """Return the similarity of each image to each text, ``[B, B]``, as logits."""
        return self.scale * self.image_features @ self.text_features.T


def pair_features(output: PairOutput) -> PairFeatures:
    """Return the features of a call with images and texts.

    Raises:
        DataError: The model was called without images or without texts.
    """
    if output.image_features is None or output.text_features is None:
        raise DataError(
            f"{type(output).__name__} lacks features of images or of texts; call the model with images and texts."
        )
    return PairFeatures(output.image_features, output.text_features, output.scale)


PairOutputT = TypeVar("PairOutputT", bound=PairOutput)


class PairObjective(Objective[ModelT, PairOutputT]):
    """Images and texts that belong together, told by features of length 1."""

    def logits(self, output: PairOutputT) -> Tensor:
        """Return the similarity of each image to each text, ``[B, B]``."""
        return pair_features(output).similarities()

    def certainty(self, output: PairOutputT) -> Tensor:
        """Return how similar images are to their texts, summed over the batch."""
        found = pair_features(output)
        return (found.image_features * found.text_features).sum()

    def distance(self, output: PairOutputT, target: PairOutputT) -> Tensor:
        """Return one minus the cosine between features and the teacher's, weighted by :data:`FEATURE_WEIGHT`.

        Similarities within a batch would say far less.
        """
        found, wanted = pair_features(output), pair_features(target)
        pairs = ((found.image_features, wanted.image_features), (found.text_features, wanted.text_features))
        return FEATURE_WEIGHT * torch.stack([(1 - (own * other).sum(-1)).mean() for own, other in pairs]).sum()
