"""Auxiliary heads: what pictures of scenes show and statements speak of, read off while training.

True or false is one bit a statement; how often either picture shows the thing and where it is tells the model far more
(:class:`StatementHeads`, over the text's class token). :class:`PatchHeads` read off each vision token what its patch shows,
:class:`ContentHeads` off a feature what a picture or its caption holds. The heads are thrown away afterwards.
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
        """Class tokens of statements [M, C], counts [M, 2] -> loss of reading off how often either picture shows what
        the statement's first phrase names."""
        logits = self.counter(tokens).float().unflatten(-1, (2, COUNT_CLASSES))
        return F.cross_entropy(logits.flatten(0, 1), counts.flatten().clamp_max(COUNT_CLASSES - 1))

    def place_loss(self, tokens: Tensor, places: Tensor, spatial: Tensor) -> Tensor:
        """Class tokens [M, C], places [M, 4] with NaN where a statement is not spatial, how many are (a batch's `spatial`)
        -> loss of pointing at the two things that decide a spatial relation."""
        known = ~places[:, 0].isnan()
        found = self.places(tokens[known]).float()
        return F.smooth_l1_loss(found, places[known], beta=0.1, reduction="sum") / spatial.clamp_min(1e-9)


def statement_losses(
    heads: StatementHeads, logits: Tensor, tokens: Tensor, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of statements about pairs, `task`, `count` and `place`, and the accuracy; logits [M, 2], class tokens [M, C]."""
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
        """Vision tokens [B, N, C] (class token first) and the annotation of B pictures -> loss, accuracy on objects' shapes.

        The annotation is labels_of_patches [B, 4, P], outline [B, P, PATCH * PATCH] and centre [B, P, 2]. The outline of the
        object inside a patch and where the object's centre lies in the picture are asked for too. Shape shows only across
        patches and is learned several times faster once tokens know where edges run; and without a reason to carry their
        position tokens lose it, and spatial relations are never learned.
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
    """Reads off a feature which kinds of things (size, colour and shape) a picture holds, and of which there are two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.contents = nn.Linear(width, 2 * KINDS_OF_THINGS)

    def forward(self, features: Tensor, things: Tensor) -> Tensor:
        """Features [B, E] of length 1, number of things of each kind [B, KINDS_OF_THINGS] -> loss."""
        wanted = torch.cat([things >= 1, things >= 2], dim=1).float()
        found = self.contents(features * features.shape[1] ** 0.5).float()
        return F.binary_cross_entropy_with_logits(found, wanted, reduction="sum") / len(features)


def faded(part: float, to: float) -> float:
    """By what factor auxiliary losses count after `part` (0 to 1) of a run: from 1 by a cosine to `to`."""
    return to + (1 - to) * 0.5 * (1 + math.cos(math.pi * part))
