"""Settings that every compression recipe shares: :class:`CompressionSettings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from madtp.config import PruningConfig
from madtp.training.compression import BUDGET_RANGES, Budget
from madtp.training.number_ranges import WEIGHT, Range, check_numbers, whole


@dataclass(frozen=True)
class CompressionSettings:
    """Settings of every recipe that compresses.

    Attributes:
        reduction: Fraction of the dense MACs to save.
        model: Name in the zoo.
        checkpoint: Weights to start from: a file, or the name of shipped weights.
        start_reduction: See :class:`madtp.training.compression.Budget`.
        ramp: See :class:`madtp.training.compression.Budget`.
        rate: See :class:`madtp.training.compression.Budget`.
        alignment_weight: Weight of the alignment loss, where both towers are pruned.
        distillation: Weight of the distance to the dense model's answers. 0 runs no dense model.
        teaching_samples: Training samples on which alignment tokens are taught (:func:`madtp.teach`).
        teaching_steps: Steps of teaching, before the first training step. 0 teaches nothing.
        teach_every: Alignment tokens are taught anew after this many training steps, as the streams that they score move. 0
            teaches once.
        pruning: Fields of :class:`madtp.PruningConfig`.

    Raises:
        ConfigError: A number is out of its range.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        **BUDGET_RANGES,
        "alignment_weight": WEIGHT,
        "distillation": WEIGHT,
        "teaching_samples": whole(1),
        "teaching_steps": whole(0),
        "teach_every": whole(0),
    }
    """What each number may be. Recipes with further ones add theirs."""

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
    pruning: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_numbers(self, self.RANGES, "settings")

    @property
    def budget(self) -> Budget:
        """How far to prune, and how fast to get there."""
        return Budget(self.reduction, self.start_reduction, self.ramp, self.rate)

    @property
    def teaches(self) -> bool:
        """Whether alignment tokens are taught at all."""
        return self.teaching_steps > 0 and PruningConfig.from_dict(dict(self.pruning)).alignment

    def teaches_at(self, step: int) -> bool:
        """Return whether alignment tokens are taught before this step."""
        return self.teaches and (step % self.teach_every == 0 if self.teach_every else step == 0)

    def config(self, seed: int) -> PruningConfig:
        """Return how to rewrite the model."""
        return PruningConfig.from_dict({"seed": seed, **self.pruning})
