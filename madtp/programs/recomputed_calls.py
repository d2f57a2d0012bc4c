"""Calls that a checkpoint makes again: start at :class:`RecomputedCalls`.

A host may wrap a region in ``torch.utils.checkpoint`` itself. The backward then calls the region outside of the host's forward,
which nothing follows, so where its image features stand is remembered from the first call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from madtp.calls.compiling import is_compiling

REMEMBERED = 4
"""Number of calls that are remembered: those of one forward, and of a few micro-batches."""


@dataclass(frozen=True)
class ImageFeatures:
    """Image features in a sequence of tokens ``[B, N, C]``.

    Attributes:
        positions: where they stand, ``[B, N]`` bool.
        dropped: at which of these stand tokens that a vision tower has dropped, ``[B, N]`` bool. None if nowhere.
    """

    positions: Tensor
    dropped: Tensor | None


class RecomputedCalls:
    """What the latest calls under a checkpoint were told of image features, by the sequence that they were given."""

    def __init__(self) -> None:
        self._known: deque[tuple[Tensor, ImageFeatures]] = deque(maxlen=REMEMBERED)

    def remember(self, sequence: Tensor, features: ImageFeatures) -> None:
        """Remember a call that a checkpoint may make again: it watches what is saved, or withholds wanted gradients."""
        if is_compiling():
            return
        watched = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if watched or (sequence.requires_grad and not torch.is_grad_enabled()):
            self._known.append((sequence.detach(), features))

    def features(self, sequence: object) -> ImageFeatures | None:
        """Return what a call with the same sequence, in memory, was told; None outside of a backward pass."""
        if is_compiling() or not isinstance(sequence, Tensor) or torch._C._current_graph_task_id() == -1:
            return None
        return next((told for known, told in reversed(self._known) if _is_same(known, sequence)), None)


def _is_same(one: Tensor, other: Tensor) -> bool:
    same = one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    return same and one._version == other._version
