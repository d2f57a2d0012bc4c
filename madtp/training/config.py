"""Settings of a training run that do not depend on what is trained: :class:`TrainingConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from madtp.errors import ConfigError

T = TypeVar("T")

OPTIMISERS = ("adamw", "muon")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how to train.

    Attributes:
        steps: optimiser steps of the whole run.
        learning_rate: highest learning rate, reached after `warmup_steps`, then a cosine down to
            `final_learning_rate`.
        optimiser: "adamw" or "muon" (Muon for the weights of Linear layers, AdamW for the rest).
        muon_factor: Muon's learning rate as a multiple of AdamW's.
        weight_decay: on matrices only (biases, norms and embeddings of one dimension have none).
        betas: AdamW's.
        clip_norm: gradients are scaled down to this global norm; 0 leaves them alone.
        precision: "float32"; "bfloat16" for autocast (weights and optimiser stay in float32); or "auto" for bfloat16 where the
            device is faster at it (:func:`madtp.training.precision.precision_on`), so that other machines may round otherwise.
        seed: what is drawn at random in a step follows from it, the step and the part of the batch.
        threads: torch threads of each process; 0 leaves torch's choice.
        accumulate: micro batches whose gradients make up one step; the batch of a step is divided over processes first.
        gradient_checkpointing: pruned models keep little between forward and backward and compute it again; see
            :attr:`madtp.pruned.PrunedModel.gradient_checkpointing`.
        tensorboard: write what is logged for TensorBoard, too.
        log_every, evaluate_every, checkpoint_every: steps between; 0 means only at the end.
        keep_checkpoints: how many of the last checkpoints stay on disk.
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
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "accumulate", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "threads", "log_every", "evaluate_every", "checkpoint_every", "clip_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ConfigError(
                f"training.final_learning_rate {self.final_learning_rate} must lie between 0 and learning_rate "
                f"{self.learning_rate}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"training.precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.optimiser not in OPTIMISERS:
            raise ConfigError(f"training.optimiser is {self.optimiser!r}; choose one of {', '.join(OPTIMISERS)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas is {self.betas}; it takes two numbers in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Return settings from plain values; names left out keep their defaults.

        Raises:
            ConfigError: a name is not a setting, or a value is out of range.
        """
        return from_plain(cls, values, "training")


def from_plain(settings: type[T], values: Mapping[str, Any], owner: str) -> T:
    """An instance of a dataclass of settings from plain values; names left out keep their defaults.

    Args:
        settings: a dataclass whose fields have defaults.
        values: by field name; lists may stand for tuples, whole numbers for floats.
        owner: what messages call the table of settings.

    Raises:
        ConfigError: a name is not a setting, or a value is of another type than the default.
    """
    known = {field.name: field for field in fields(settings)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{owner} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    converted = {}
    for name, value in values.items():
        wanted = type(known[name].default)
        converted[name] = tuple(value) if wanted is tuple and isinstance(value, list) else value
        optional = value is None and "None" in str(known[name].type)
        if optional or wanted not in (int, float, str, tuple, bool):
            continue
        fits = isinstance(converted[name], wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(f"{owner}.{name} is {value!r}; it takes a {wanted.__name__}")
    return settings(**converted)
