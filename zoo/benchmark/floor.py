"""The floor of a pruned model's time: :func:`floor_of`.

It runs the dense model's layers on exactly the token counts that a pruned model kept in a batch: packed, one attention for each
sample, without scoring and without gathering. Which tokens it computes is meaningless; how long it takes is the least that an
implementation of pruning with these counts can hope for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from madtp.errors import ConfigError
from zoo.benchmark.packed_reasoning import PackedReasoning
from zoo.benchmark.packed_rows import TokenCounts, kept_by_block
from zoo.benchmark.packed_vision import PackedVisionTower
from zoo.blip.nlvr import BlipNlvr

Floor = Callable[[Mapping[str, Any], TokenCounts], Tensor]
"""Takes keyword arguments of the model, and the tokens of each sample by site; returns the output."""


def floor_of(model: nn.Module) -> Floor:
    """Return the floor of a dense model.

    Raises:
        ConfigError: the floor of this kind of model is not known.
    """
    if isinstance(model, BlipNlvr):
        packed = PackedReasoning(model)
        return lambda given, counts: packed(**given, counts=counts)
    if not hasattr(model, "patch_embed"):
        raise ConfigError(
            f"the floor of {type(model).__name__} is not known; it is for vision transformers of timm and BlipNlvr."
        )
    tower = PackedVisionTower(model)

    def run(given: Mapping[str, Any], counts: TokenCounts) -> Tensor:
        rows, lengths = tower.embed(given["x"])
        kept = kept_by_block(counts, "blocks.", tower.depth, lengths)
        return tower.head(*tower.blocks(rows, lengths, kept))

    return run
