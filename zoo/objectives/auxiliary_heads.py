"""Heads that read annotations of scenes off tokens during training, and are discarded afterwards.

Whether a statement is true is one bit. How often either picture shows the thing, and where it is, tells the model far more:
:class:`StatementHeads` read both off the text's class token. :class:`PatchHeads` read off each vision token what its patch
shows, :class:`ContentHeads` off a feature what a picture or its caption holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.scenes.drawing import PATCH
from zoo.scenes.objects import COLOURS, SHAPES, SIZES

COUNT_CLASSES = 6

PATCH_CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1, 2)
"""Classes of the patch labels, in the order of :func:`zoo.scenes.drawing.draw_pictures`."""

KINDS_OF_THINGS = len(COLOURS) * len(SHAPES) * len(SIZES)


class StatementHeads(nn.Module):
    """Linear heads that read counts and places off the class tokens of statements."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.counter = nn.Linear(width, 2 * COUNT_CLASSES)
        self.places = nn.Linear(width, 4)

    def count_loss(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Return the loss of reading off how often either picture shows what the statement's first phrase names.

        Args:
            tokens: Class tokens of M statements, ``[M, C]``.
            counts: ``[M, 2]``.
        """
        logits = self.counter(tokens).float().unflatten(-1, (2, COUNT_CLASSES))
        return F.cross_entropy(logits.flatten(0, 1), counts.flatten().clamp_max(COUNT_CLASSES - 1))

    def place_loss(self, tokens: Tensor, places: Tensor, spatial: Tensor) -> Tensor:
        """Return the loss of pointing at the two things that decide a spatial relation.

        Args:
            tokens: Class tokens of M statements, ``[M, C]``.
            places: ``[M, 4]``, NaN where a statement is not spatial.
            spatial: How many are spatial, a scalar: the batch's ``spatial``.
        """
        known = ~places[:, 0].isnan()
        found: Tensor = self.places(tokens[known]).float()
        return F.smooth_l1_loss(found, places[known], beta=0.1, reduction="sum") / spatial.clamp_min(1e-9)


def statement_losses(
    heads: StatementHeads, logits: Tensor, tokens: Tensor, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the losses of M statements, ``task``, ``count`` and ``place``, and the accuracy.

    Args:
        heads: Heads on the class tokens.
        logits: ``[M, 2]``.
        tokens: Class tokens, ``[M, C]``.
        batch: A batch of :func:`zoo.objectives.scene_batches.make_batch` with statements.
    """
    labels = batch["labels"].flatten()
    losses = {
        "task": F.cross_entropy(logits, labels),
        "count": heads.count_loss(tokens, batch["counts"].flatten(0, 1)),
        "place": heads.place_loss(tokens, batch["places"].flatten(0, 1), batch["spatial"]),
    }
    return losses, (logits.argmax(-1) == labels).float().mean()


class PatchHeads(nn.Module):
    """Linear heads that read annotations of patches off vision tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.Linear(width, sum(PATCH_CLASSES) + PATCH * PATCH + 2)

    def forward(self, tokens: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss, and the accuracy on the shapes of objects.

        The heads also read off the outline of the object inside a patch, and where in the picture the object's centre lies.
        Shape shows only across patches, and is learned several times faster once tokens know where edges run. Without a reason
        to carry their position tokens lose it, and spatial relations are never learned.

        Args:
            tokens: Vision tokens, ``[B, N, C]``, class token first.
            batch: The annotation of B pictures: ``labels_of_patches`` ``[B, 4, P]``, ``outline`` ``[B, P, PATCH * PATCH]`` and
                ``centre`` ``[B, P, 2]``.
        """
        *parts, outline, centre = self.heads(tokens[:, 1:]).float().split((*PATCH_CLASSES, PATCH * PATCH, 2), dim=-1)
        targets = batch["labels_of_patches"].unbind(1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), target.flatten()) for part, target in zip(parts, targets, strict=True)
        ]
        losses.append(F.binary_cross_entropy_with_logits(outline, batch["outline"].float()))
        losses.append(F.smooth_l1_loss(centre, batch["centre"]))
        on_object = targets[1] > 0
        right = (parts[1].argmax(-1) == targets[1])[on_object].float().mean()
        return torch.stack(losses).sum(), right


class ContentHeads(nn.Module):
    """A linear head that predicts which kinds of things (size, colour, shape) there are, and which occur twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.contents = nn.Linear(width, 2 * KINDS_OF_THINGS)

    def forward(self, features: Tensor, things: Tensor) -> Tensor:
        """Return the loss.

        Args:
            features: ``[B, E]``, of length 1.
            things: Number of things of each kind, ``[B, KINDS_OF_THINGS]``.
        """
        wanted = torch.cat([things >= 1, things >= 2], dim=1).float()
        found = self.contents(features * features.shape[1] ** 0.5).float()
        return F.binary_cross_entropy_with_logits(found, wanted, reduction="sum") / len(features)


def faded(progress: float, to: float) -> float:
    """Return the factor of auxiliary losses after this fraction of a run: it falls from 1 to ``to`` along a cosine."""
    return to + (1 - to) * 0.5 * (1 + math.cos(math.pi * progress))
