"""The optimisers and their learning rate: :func:`make_optimisers`, :func:`learning_rate_at`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from madtp.errors import TrainingError
from madtp.training.config import TrainingConfig

_LEAST_MUON_SIDE = 32


def make_optimisers(module: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers over the parameters that require a gradient.

    ``"adamw"`` is one AdamW, without weight decay for vectors and scalars. ``"muon"`` gives the weights of Linear layers to
    Muon, at ``muon_factor`` times the learning rate, and the rest to AdamW. The narrowest Linear layers are heads, and stay
    with AdamW.

    Raises:
        TrainingError: if no parameter requires a gradient.
    """
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not wanted:
        raise TrainingError(f"no parameter of {type(module).__name__} requires a gradient, so nothing can be trained")
    made: list[torch.optim.Optimizer] = []
    if config.optimiser == "muon" and (matrices := _matrices(module)):
        made.append(
            torch.optim.Muon(
                matrices,
                lr=config.learning_rate * config.muon_factor,
                weight_decay=config.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
        )
        taken = {id(matrix) for matrix in matrices}
        wanted = [parameter for parameter in wanted if id(parameter) not in taken]
    groups = [
        {"params": [p for p in wanted if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in wanted if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        made.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return made


def _matrices(module: nn.Module) -> list[Tensor]:
    """Return the weights for Muon, each once even where modules share them."""
    found = {
        id(layer.weight): layer.weight
        for layer in module.modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and min(layer.weight.shape) >= _LEAST_MUON_SIDE
    }
    return list(found.values())


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then a cosine to the final one."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    part = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def set_learning_rate(optimisers: Sequence[torch.optim.Optimizer], fraction: float) -> None:
    """Set the learning rate of every group to a fraction of its highest."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * fraction
