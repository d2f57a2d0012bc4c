"""Settings of a training run that do not depend on what is trained: :class:`TrainingConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, TypeVar

from madtp.errors import ConfigError
from madtp.training.number_ranges import MOST_PROCESSES, SEED, Range, check_numbers, whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

OPTIMISERS = ("adamw", "muon")
PRECISIONS = ("auto", "float32", "bfloat16")
RANGES: Mapping[str, Range] = {
    "steps": whole(1, 10**8 - 1),  # names of checkpoints have eight digits
    "learning_rate": Range(0, 100, above=True),
    "final_learning_rate": Range(0, 100),
    "warmup_steps": whole(0),
    "muon_factor": Range(0, 1000, above=True),
    "weight_decay": Range(0, 10),
    "clip_norm": Range(0, 10**9),
    "seed": SEED,
    "threads": whole(0, MOST_PROCESSES),
    "accumulate": whole(1),
    "log_every": whole(0),
    "evaluate_every": whole(0),
    "checkpoint_every": whole(0),
    "keep_checkpoints": whole(1),
}
"""What the numbers of :class:`TrainingConfig` may be."""

_BETA = Range(0, 1, below=True)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how to train.

    Attributes:
        steps: optimiser steps of the whole run.
        learning_rate: highest learning rate. It is reached after ``warmup_steps``; a cosine then leads down to
            ``final_learning_rate``.
        final_learning_rate: learning rate at the end of the run.
        warmup_steps: steps of the linear warm-up.
        optimiser: ``"adamw"``, or ``"muon"`` (Muon for the weights of Linear layers, AdamW for the rest).
        muon_factor: learning rate of Muon as a multiple of that of AdamW.
        weight_decay: weight decay of matrices; biases, norms and other vectors have none.
        betas: momenta of AdamW.
        clip_norm: global norm to which larger gradients are scaled down; 0 disables clipping.
        precision: ``"float32"``; ``"bfloat16"`` for autocast (weights and optimiser stay in float32); or ``"auto"`` for
            bfloat16 where the device is faster at it (:func:`madtp.training.precision.precision_on`). With ``"auto"``,
            other machines may round differently.
        seed: seed of all random draws, together with the step and the share of the batch.
        threads: torch threads of each process; 0 leaves the choice to torch.
        accumulate: micro batches whose gradients make up one step. The batch is divided over processes first.
        gradient_checkpointing: recompute the activations of pruned models in the backward; see
            :attr:`madtp.pruned.PrunedModel.gradient_checkpointing`.
        tensorboard: also write the logged numbers for TensorBoard.
        log_every: steps between two lines of the log; 0 logs only the last step.
        evaluate_every: steps between two evaluations; 0 evaluates only at the end.
        checkpoint_every: steps between two checkpoints; 0 writes only the last one.
        keep_checkpoints: number of the latest checkpoints that stay on disk.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    warmup_steps: int = 100
    optimiser: str = "adamw"
    muon_factor: float = 4.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    precision: str = "auto"
    seed: int = 0
    threads: int = 0
    accumulate: int = 1
    gradient_checkpointing: bool = False
    tensorboard: bool = False
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        check_numbers(self, RANGES, "training")
        if self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                f"training.final_learning_rate {self.final_learning_rate} must lie between 0 and learning_rate "
                f"{self.learning_rate}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"training.precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.optimiser not in OPTIMISERS:
            raise ConfigError(f"training.optimiser is {self.optimiser!r}; choose one of {', '.join(OPTIMISERS)}")
        if not isinstance(self.betas, tuple) or len(self.betas) != 2 or not all(beta in _BETA for beta in self.betas):
            raise ConfigError(f"training.betas is {self.betas}; it takes two numbers in [0, 1)")

    def to_dict(self) -> dict[str, object]:
        """Return the settings as plain values."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TrainingConfig:
        """Return settings from plain values; names left out keep their defaults.

        Raises:
            ConfigError: if a name is not a setting, or a value is out of range.
        """
        return from_plain(cls, values, "training")


def from_plain(settings: type[T], values: Mapping[str, object], owner: str) -> T:
    """Make an instance of a dataclass of settings from plain values; names left out keep their defaults.

    Args:
        settings: a dataclass whose fields have defaults.
        values: values by field name; lists may stand for tuples, whole numbers for floats.
        owner: name of the table of settings in error messages.

    Raises:
        ConfigError: if a name is not a setting, or a value has another type than the default.
    """
    make: Callable[..., T] = settings
    known = {field.name: field for field in fields(settings)}
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{owner} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    converted: dict[str, object] = {}
    for name, value in values.items():
        wanted = type(known[name].default)
        converted[name] = tuple(value) if wanted is tuple and isinstance(value, list) else value
        optional = value is None and "None" in str(known[name].type)
        if optional or wanted not in (int, float, str, tuple, bool):
            continue
        fits = isinstance(converted[name], wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(f"{owner}.{name} is {value!r}; it takes a {wanted.__name__}")
    return make(**converted)
