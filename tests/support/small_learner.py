"""A network of a few numbers to train, and configs for it: :func:`learner`, :func:`tiny`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from madtp.training import Learner, TrainingConfig
from madtp.training.progress import Progress

QUIET = Progress(quiet=True)


def tiny(**changes: Any) -> TrainingConfig:
    base = {
        "steps": 12,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "checkpoint_every": 4,
        "evaluate_every": 5,
        "log_every": 2,
        "precision": "float32",
    }
    return TrainingConfig.from_dict({**base, **changes})


def learner(nan_at: int = -1) -> Learner:
    """A small network with dropout (so that random state matters), a frozen part and a tied weight."""
    torch.manual_seed(7)
    module = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.3), nn.ReLU(), nn.Linear(40, 40), nn.Linear(40, 2))
    module[3].bias.requires_grad_(False)

    def batch(step: int, rows: range) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator)
        return {"x": x, "y": (x[:, 0] > 0).long()}

    def loss(module: nn.Module, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        value = nn.functional.cross_entropy(module(batch["x"]).float(), batch["y"])
        return (value * float("nan") if step == nan_at else value), {"task": value.detach()}

    def evaluate(module: nn.Module) -> dict[str, float]:
        assert not module.training
        return {"noise": float(torch.rand(()))}

    return Learner(module, batch, loss, evaluate=evaluate)
