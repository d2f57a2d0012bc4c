"""Auxiliary heads over the text's class token: what a statement about scenes speaks of, read off while training.

True or false is one bit a statement; how often either picture shows the thing and where it is tells the model far more.
Dense training and compression both use :class:`StatementHeads`; the heads are thrown away afterwards.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

COUNT_CLASSES = 6


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


def faded(part: float, to: float) -> float:
    """By what factor auxiliary losses count after `part` (0 to 1) of a run: from 1 by a cosine to `to`."""
    return to + (1 - to) * 0.5 * (1 + math.cos(math.pi * part))
