"""Teach the alignment tokens which tokens the model's outputs depend on, before or instead of fine-tuning: :func:`teach`.

Alignment tokens start as noise, and noise gives the largest score to the tokens of largest norm. In a residual stream these are
often background patches, in which the model stores nothing about the image. The task hardly corrects that, as the decision
which tokens to drop passes no gradient. So the alignment tokens are taught directly, without labels: a token's *saliency* is
the norm of the gradient of the unpruned model's outputs with respect to it, and s2 is brought close to it. Nothing else of the
model changes (docs/method.md, "Teaching").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call, Inputs
from madtp.errors import ConfigError, MadtpError
from madtp.method.guidance import AlignmentTokens
from madtp.method.importance import TINY, best_of, guidance_share
from madtp.pruned import PrunedModel
from madtp.pruned.arguments import check_pruned
from madtp.sites.control import Observation
from madtp.tokens.packing import in_slots
from madtp.tuning.batches import calls_of, evaluating

TOP = 4
"""Agreement is measured on the most salient 1 / TOP of the tokens."""

SaliencyObjective: TypeAlias = Callable[[Any], Tensor]
"""Maps what the model returns to a scalar, whose gradient tells which tokens matter."""


@dataclass(frozen=True)
class TeachingResult:
    """What :func:`teach` did.

    Attributes:
        steps: number of optimiser steps.
        before: agreement at each site before teaching, ``{site: fraction}``: of the most salient quarter of a sample's tokens,
            the part that is also in the quarter with the largest s2 (about 0.25 by chance), measured on the batches. A site is
            left out if none of its tokens matters; after the last block of a tower often only the class token is read.
        after: agreement after teaching.
    """

    steps: int
    before: dict[str, float]
    after: dict[str, float]

    def __str__(self) -> str:
        mean = [sum(part.values()) / len(part) for part in (self.before, self.after)]
        return f"agreement of guidance with saliency {mean[0]:.0%} before, {mean[1]:.0%} after {self.steps} steps"


@dataclass(frozen=True)
class _Example:
    """A training example for the alignment tokens: one site on one batch.

    Attributes:
        site: its name.
        query: its query projection.
        block_input: ``[B, N, C]`` residual stream at the block's input.
        candidates: ``[B, N]`` bool, the tokens that pruning may take.
        saliency: ``[B, N]``, the target of s2.
    """

    site: str
    query: nn.Module
    block_input: Tensor
    candidates: Tensor
    saliency: Tensor


def teach(
    pruned: PrunedModel,
    batches: Iterable[Inputs],
    *,
    objective: SaliencyObjective | None = None,
    steps: int = 200,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> TeachingResult:
    """Train the alignment tokens, and the query projections in front of them, to give salient tokens a large s2.

    For each site and sample, with saliency t_j = |d objective / d x_j| divided by its sum, the loss is the cross-entropy
    - sum_j t_j log s2_j over the tokens that pruning may take. Adam goes through the batches in turn.

    Args:
        pruned: a model from :func:`madtp.rewrite`. It is run unpruned, in eval mode. Its mode, strength and other
            weights stay as they are.
        batches: inputs as the model takes them, without labels, dicts of keyword arguments or tuples of positional ones; a
            few hundred samples in all. One forward and backward each; their residual streams are held in memory.
        objective: maps what the model returns to a scalar whose gradient tells what matters, such as the margin of a
            classifier's answer. None sums all floating-point outputs, each entry with a random sign: then the squared saliency
            is, in expectation, the squared Frobenius norm of the outputs' Jacobian.
        steps: number of optimiser steps, of one batch each.
        learning_rate: Adam's learning rate, for alignment tokens that start from N(0, 1).
        seed: the seed of the random signs.

    Returns:
        How well guidance agrees with saliency before and after.

    Raises:
        ArgumentError: ``pruned`` is no pruned model.
        ConfigError: a value is out of range, or the model has no alignment tokens.
        ExampleInputsError: there are no batches, or they do not fit the model.
        MadtpError: the objective does not depend on any prunable token.
    """
    check_pruned(pruned)
    if steps < 1 or not learning_rate > 0:
        raise ConfigError(f"steps is {steps} and learning_rate {learning_rate}; both have to be positive.")
    alignment = pruned.madtp.control.alignment
    if not pruned.madtp.config.alignment or alignment is None:
        raise ConfigError("the model has no alignment tokens to teach: its configuration says alignment=False.")
    calls = calls_of(pruned, batches)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("teaching alignment tokens", total=len(calls) + steps)
        examples = []
        for number, call in enumerate(calls):
            examples.append(_examples(pruned, call, objective or _RandomSigns(seed + number)))
            progress.advance(task)
        if not any(examples):
            raise MadtpError(
                "the objective does not depend on any token that pruning may take; give an objective that reads the "
                "model's outputs with gradients."
            )
        before = _agreement(alignment, examples)
        for _ in _fit(alignment, [batch for batch in examples if batch], steps, learning_rate):
            progress.advance(task)
    return TeachingResult(steps, before, _agreement(alignment, examples))


class _RandomSigns:
    """The sum of all floating-point outputs, each entry with a random sign."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: object) -> Tensor:
        leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        total = torch.zeros(())
        for leaf in leaves:
            signs = torch.randint(0, 2, leaf.shape, generator=self.generator).to(leaf.device) * 2.0 - 1.0
            finite = leaf.float().nan_to_num(0.0, 0.0, 0.0)
            total = total.to(leaf.device) + (finite * signs).sum()
        return total


@contextmanager
def _unpruned(pruned: PrunedModel, observer: Callable[[Observation], None]) -> Iterator[None]:
    """Inside the block sites score tokens and are observed, but drop nothing except padding."""
    control = pruned.madtp.control
    before = pruned.madtp.temperature, pruned.madtp.gain, control.observer, control.static_counts, control.forced
    pruned.madtp.temperature, pruned.madtp.gain = before[0] or 1.0, 0.0
    control.observer, control.static_counts, control.forced = observer, {}, None
    try:
        yield
    finally:
        pruned.madtp.temperature, pruned.madtp.gain, control.observer, control.static_counts, control.forced = before


def _examples(pruned: PrunedModel, call: Call, objective: SaliencyObjective) -> list[_Example]:
    """The examples of one batch, of the sites whose tokens matter."""
    observed: list[Observation] = []

    def observe(observation: Observation) -> None:
        # With frozen weights nothing before the first site wants a gradient.
        if not observation.tokens.requires_grad:
            observation.tokens.requires_grad_(True)
        observed.append(observation)

    with evaluating(pruned), _unpruned(pruned, observe), torch.enable_grad():
        value = objective(pruned(*call.args, **call.kwargs))
        if not value.requires_grad:
            return []
        gradients = torch.autograd.grad(value, [site.tokens for site in observed], allow_unused=True)
    examples = []
    for site, gradient in zip(observed, gradients, strict=True):
        saliency = None if gradient is None else _saliency(in_slots(gradient, site.state), site.candidates)
        if saliency is not None and bool(saliency.any()):
            examples.append(
                _Example(
                    site=site.site,
                    query=site.query,
                    block_input=in_slots(site.block_input.detach(), site.state),
                    candidates=site.candidates,
                    saliency=saliency,
                )
            )
    return examples


def _saliency(gradient: Tensor, candidates: Tensor) -> Tensor:
    """Saliency ``[B, N]``, which sums to one over the candidates of a sample, or is zero if none of them matters."""
    norm: Tensor = gradient.float().norm(dim=-1).masked_fill(~candidates, 0.0)
    return norm / norm.sum(dim=1, keepdim=True).clamp_min(TINY)


def _fit(
    alignment: AlignmentTokens, examples: list[list[_Example]], steps: int, learning_rate: float
) -> Iterator[Tensor]:
    """Train on the examples of one batch a step; gives the loss of each step."""
    modules = {id(module): module for batch in examples for module in (alignment, *(one.query for one in batch))}
    parameters = [p for module in modules.values() for p in module.parameters()]
    required = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    try:
        for step in range(steps):
            batch = examples[step % len(examples)]
            with torch.enable_grad():
                loss = torch.stack([_loss(alignment, example) for example in batch]).mean()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            yield loss.detach()
    finally:
        for parameter, flag in zip(parameters, required, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)


def _s2(alignment: AlignmentTokens, example: _Example) -> Tensor:
    best: Tensor = best_of(alignment(example.query(example.block_input)))
    return guidance_share(best, example.candidates)


def _loss(alignment: AlignmentTokens, example: _Example) -> Tensor:
    log_s2 = _s2(alignment, example).clamp_min(TINY).log()
    return -(example.saliency * log_s2).sum(1).mean()


@torch.no_grad()
def _agreement(alignment: AlignmentTokens, examples: list[list[_Example]]) -> dict[str, float]:
    """By site, how many of the most salient tokens are also among those with the largest s2."""
    shares: dict[str, list[Tensor]] = {}
    for example in (example for batch in examples for example in batch):
        count = example.candidates.sum(1)
        top = (count + TOP - 1) // TOP
        salient = _best(example.saliency.masked_fill(~example.candidates, -1.0), top)
        guided = _best(_s2(alignment, example).masked_fill(~example.candidates, -1.0), top)
        shared = (salient & guided).sum(1)[count > 1] / top[count > 1]
        shares.setdefault(example.site, []).append(shared)
    return {site: float(torch.cat(parts).mean()) for site, parts in shares.items() if sum(map(len, parts))}


def _best(scores: Tensor, count: Tensor) -> Tensor:
    """``[B, N]`` bool: the ``count [B]`` largest of each row."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < count[:, None]
