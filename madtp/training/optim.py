"""The optimiser and its learning rate: :func:`make_optimiser`, :func:`learning_rate_at`."""

from __future__ import annotations

import math

import torch
from torch import nn

from madtp.errors import TrainingError
from madtp.training.config import TrainingConfig


def make_optimiser(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters that want a gradient; vectors and scalars are not decayed.

    Raises:
        TrainingError: no parameter wants a gradient.
    """
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not wanted:
        raise TrainingError(f"no parameter of {type(module).__name__} wants a gradient; nothing can be trained")
    groups = [
        {"params": [p for p in wanted if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in wanted if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then a cosine to the final one."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    part = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimiser.param_groups:
        group["lr"] = rate
