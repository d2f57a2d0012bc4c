"""Teach the alignment tokens which tokens the model's outputs depend on, before or instead of fine-tuning: :func:`teach`.

Alignment tokens start as noise, and what noise likes best in a residual stream is the token of largest norm: often a patch of
background that the model uses as a place to put nothing. The task hardly corrects that, as the decision which tokens to drop
passes no gradient. So they are taught directly, without labels: a token's *saliency* is the norm of the gradient of the
unpruned model's outputs with respect to it, and s2 is brought close to it. Nothing else of the model changes
(docs/method.md, "Teaching").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.errors import ConfigError, MadtpError
from madtp.method.importance import TINY, guidance_share
from madtp.pruned import PrunedModel
from madtp.sites.control import Observation
from madtp.tuning.batches import calls_of, evaluating

TOP = 4
"""Agreement is measured on the most salient 1 / TOP of the tokens."""

Objective = Callable[[Any], Tensor]


@dataclass(frozen=True)
class TeachingResult:
    """What :func:`teach` did.

    Attributes:
        steps: of the optimiser.
        before, after: agreement at each site whose tokens matter (behind the last one of a tower often only the class token
            is read), ``{site: fraction}``: of the most salient quarter of a sample's tokens, the
            part that is also in the quarter with the largest s2 (about 0.25 by chance). Measured on the batches.
    """

    steps: int
    before: dict[str, float]
    after: dict[str, float]

    def __str__(self) -> str:
        mean = [sum(part.values()) / len(part) for part in (self.before, self.after)]
        return f"agreement of guidance with saliency {mean[0]:.0%} before, {mean[1]:.0%} after {self.steps} steps"


@dataclass(frozen=True)
class Lesson:
    """Of one site and one batch: its query projection, block input ``[B, N, C]``, candidates and saliency ``[B, N]``."""

    site: str
    query: nn.Module
    block_input: Tensor
    candidates: Tensor
    saliency: Tensor


def teach(
    pruned: PrunedModel,
    batches: Iterable[Mapping[str, Any] | tuple[Any, ...]],
    *,
    objective: Objective | None = None,
    steps: int = 200,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> TeachingResult:
    """Train the alignment tokens, and the maps in front of them, to give salient tokens a large s2.

    For each site and sample, with saliency t_j = |d objective / d x_j| over its sum, the loss is the cross-entropy
    - sum_j t_j log s2_j over the tokens that pruning may take; Adam goes through the batches in turn.

    Args:
        pruned: from :func:`madtp.rewrite`. It is run unpruned, in eval mode; its mode, strength and weights are left alone.
        batches: inputs as the model takes them, without labels, dicts of keyword arguments or tuples of positional ones; a
            few hundred samples in all. One forward and backward each; their streams are held in memory.
        objective: the model's return value -> scalar whose gradient tells what matters, such as the margin of a
            classifier's answer. None takes all floating outputs, each entry with a random sign: then the squared saliency is,
            in expectation, the squared Frobenius norm of the outputs' Jacobian.
        steps: of the optimiser, one batch each.
        learning_rate: of Adam, on alignment tokens that start from N(0, 1).
        seed: of the random signs.
    Returns:
        how well guidance agrees with saliency before and after.
    Raises:
        ConfigError: a value is out of range, or the model has no alignment tokens.
        ExampleInputsError: no batches, or they do not fit the model.
        MadtpError: the objective does not depend on any prunable token.
    """
    if steps < 1 or not learning_rate > 0:
        raise ConfigError(f"steps is {steps} and learning_rate {learning_rate}; both have to be positive.")
    if not pruned.config.alignment or pruned._control.alignment is None:
        raise ConfigError("the model has no alignment tokens to teach: its configuration says alignment=False.")
    calls = calls_of(pruned, batches)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("teaching alignment tokens", total=len(calls) + steps)
        lessons = []
        for number, call in enumerate(calls):
            lessons.append(_lessons(pruned, call, objective or _Signs(seed + number)))
            progress.advance(task)
        if not any(lessons):
            raise MadtpError(
                "the objective does not depend on any token that pruning may take; give an objective that reads the "
                "model's outputs with gradients."
            )
        before = _agreement(pruned, lessons)
        for _ in _fit(pruned, [part for part in lessons if part], steps, learning_rate):
            progress.advance(task)
    return TeachingResult(steps, before, _agreement(pruned, lessons))


class _Signs:
    """The sum of all floating outputs, each entry with a random sign."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Any) -> Tensor:
        leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        total = torch.zeros(())
        for leaf in leaves:
            signs = torch.randint(0, 2, leaf.shape, generator=self.generator).to(leaf.device) * 2.0 - 1.0
            finite = leaf.float().nan_to_num(0.0, 0.0, 0.0)
            total = total.to(leaf.device) + (finite * signs).sum()
        return total


@contextmanager
def _unpruned(pruned: PrunedModel, observer: Callable[[Observation], None]) -> Iterator[None]:
    """Sites judge, and are observed, but drop nothing except padding."""
    control = pruned._control
    before = pruned.temperature, pruned.gain, control.observer, control.static_counts, control.forced
    pruned.temperature, pruned.gain = before[0] or 1.0, 0.0
    control.observer, control.static_counts, control.forced = observer, {}, None
    try:
        yield
    finally:
        pruned.temperature, pruned.gain, control.observer, control.static_counts, control.forced = before


def _lessons(pruned: PrunedModel, call: Call, objective: Objective) -> list[Lesson]:
    seen: list[Observation] = []

    def observe(observation: Observation) -> None:
        # With frozen weights nothing before the first site wants a gradient.
        if not observation.tokens.requires_grad:
            observation.tokens.requires_grad_(True)
        seen.append(observation)

    with evaluating(pruned), _unpruned(pruned, observe), torch.enable_grad():
        value = objective(pruned(*call.args, **call.kwargs))
        if not value.requires_grad:
            return []
        gradients = torch.autograd.grad(value, [one.tokens for one in seen], allow_unused=True)
    lessons = []
    for one, gradient in zip(seen, gradients, strict=True):
        saliency = None if gradient is None else _saliency(gradient, one.candidates)
        if saliency is not None and bool(saliency.any()):
            lessons.append(Lesson(one.site, one.query, one.block_input.detach(), one.candidates, saliency))
    return lessons


def _saliency(gradient: Tensor, candidates: Tensor) -> Tensor:
    """Saliency ``[B, N]`` over the candidates, with sum one; zero for a sample that has none."""
    norm = gradient.float().norm(dim=-1).masked_fill(~candidates, 0.0)
    return norm / norm.sum(dim=1, keepdim=True).clamp_min(TINY)


def _fit(pruned: PrunedModel, lessons: list[list[Lesson]], steps: int, learning_rate: float) -> Iterator[Tensor]:
    alignment = pruned._control.alignment
    assert alignment is not None
    modules = {id(module): module for batch in lessons for module in (alignment, *(lesson.query for lesson in batch))}
    parameters = [p for module in modules.values() for p in module.parameters()]
    wanted = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    try:
        for step in range(steps):
            batch = lessons[step % len(lessons)]
            with torch.enable_grad():
                loss = torch.stack([_loss(pruned, lesson) for lesson in batch]).mean()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            yield loss.detach()
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)


def _s2(pruned: PrunedModel, lesson: Lesson) -> Tensor:
    alignment = pruned._control.alignment
    assert alignment is not None
    return guidance_share(alignment(lesson.query(lesson.block_input)), lesson.candidates)


def _loss(pruned: PrunedModel, lesson: Lesson) -> Tensor:
    return -(lesson.saliency * _s2(pruned, lesson).clamp_min(TINY).log()).sum(1).mean()


@torch.no_grad()
def _agreement(pruned: PrunedModel, lessons: list[list[Lesson]]) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {}
    for lesson in (lesson for batch in lessons for lesson in batch):
        count = lesson.candidates.sum(1)
        top = (count + TOP - 1) // TOP
        salient = _best(lesson.saliency.masked_fill(~lesson.candidates, -1.0), top)
        guided = _best(_s2(pruned, lesson).masked_fill(~lesson.candidates, -1.0), top)
        shared = (salient & guided).sum(1)[count > 1] / top[count > 1]
        found.setdefault(lesson.site, []).append(shared)
    return {site: float(torch.cat(parts).mean()) for site, parts in found.items() if sum(map(len, parts))}


def _best(scores: Tensor, count: Tensor) -> Tensor:
    """``[B, N]`` bool: the ``count [B]`` largest of each row."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < count[:, None]
