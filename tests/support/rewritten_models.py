"""Rewritten models for the tests of the invariants, each made once in a process.

Start at :func:`subject`. Settings of a subject are changed inside context managers only, so that tests do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from case_models import CASES
from model_case import Case
from torch import Tensor, nn

import madtp
from madtp import PruningConfig
from madtp.calls.fast_path import spelled_out


class Subject:
    """A case with its model and the rewritten model.

    Attributes:
        case: what is known about the model.
        model: the original.
        pruned: the rewritten model.
        names: of the sites by stream, in the order of layers.
    """

    def __init__(
        self, case: Case, model: nn.Module, pruned: madtp.PrunedModel, names: dict[str, tuple[str, ...]]
    ) -> None:
        self.case, self.model, self.pruned, self.names = case, model, pruned, names

    def __repr__(self) -> str:
        return self.case.name

    @contextmanager
    def set(
        self,
        *,
        temperature: float = 1.0,
        gain: float = 1.0,
        forced: dict[str, list[Tensor]] | None = None,
        **config: Any,
    ) -> Iterator[madtp.PrunedModel]:
        """Change settings inside the block.

        Args:
            temperature: T of the threshold.
            gain: factor on the threshold.
            forced: survivors ``[B, N]`` by stream and layer, in place of the method's choice.
            config: further fields of the configuration.
        """
        control = self.pruned.madtp.control
        before = control.temperature, control.gain, control.config, control.forced
        control.temperature, control.gain = temperature, gain
        control.config = replace(control.config, **config)
        if forced is not None:
            control.forced = {n: f for s, names in self.names.items() for n, f in zip(names, forced[s], strict=True)}
        try:
            yield self.pruned
        finally:
            control.temperature, control.gain, control.config, control.forced = before


@cache
def subject(name: str) -> Subject:
    """The subject of the case of this name."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.build()
    with eager_arithmetic():
        pruned = madtp.rewrite(model, case.inputs(3, 7), config=PruningConfig(alignment_tokens=10))
    names = {s: tuple(site.name for site in pruned.report.sites if site.modality == s) for s in case.layers}
    return Subject(case, model, pruned, names)


# The fused encoder layer of torch rounds differently from the operations that it stands for.
eager_arithmetic = spelled_out


def gap(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative to the scale of ``first``; NaN counts as infinite."""
    assert first.shape == second.shape, f"shapes {tuple(first.shape)} and {tuple(second.shape)}"
    if not first.numel():
        return 0.0
    scale = first.detach().abs().amax().clamp(min=0.1)
    return float(((first.detach() - second.detach()).abs() / scale).nan_to_num(float("inf")).amax())


def gradients(model: nn.Module, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of all parameters under a fixed random weighting of all outputs."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros(())
    for leaf in run().values():
        loss = loss + (leaf * torch.randn(leaf.shape, generator=generator)).sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
