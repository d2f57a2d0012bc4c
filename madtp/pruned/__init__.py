"""The pruned model: what :func:`madtp.rewrite` returns. Start at :class:`~madtp.pruned.model.PrunedModel`."""

from __future__ import annotations

from madtp.pruned.handle import AlignmentSpec, PruningHandle
from madtp.pruned.model import PrunedModel

__all__ = ["AlignmentSpec", "PrunedModel", "PruningHandle"]
