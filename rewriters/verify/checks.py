"""Verify: invariants checked on every rewrite.

Start at :data:`CHECKS`. The cheap ones run here; the tests run all invariants of the design on many models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from madtp.calls.agreement import Run, require_agreement, starting_with
from madtp.calls.batch import free_batch
from madtp.calls.branches import OtherBranch
from madtp.calls.call import Call
from madtp.calls.fast_path import spelled_out
from madtp.errors import RewriteError
from madtp.programs.lost_gradients import lost_gradients
from madtp.programs.program import Program
from madtp.programs.program_builder import EXPENSIVE
from madtp.sites.control import PruningControl
from madtp.sites.preserved_state import trial_run
from madtp.sites.steady_draws import comparable_draws, is_training, values_are_comparable
from rewriters.graph.nodes import attribute, example_size
from rewriters.plan.plan import Plan
from rewriters.verify.replay import batch_mates_do_not_matter, differences, dropping_equals_hiding, first_sample

COUPLED = (
    "output {} of the first sample alone differs by {:.1e} of its scale from what the model itself computes for it in its "
    "batch, so no one graph serves both. It decides by values that are not in the graph: a mask that hides nothing may be left "
    "out. Call the model without the mask, or change it to compute the same in either case."
)


class SampleAlone(NamedTuple):
    """A call of one sample, and what the model returns for it."""

    call: Call
    expected: object


@dataclass(frozen=True)
class Case:
    """What a check may look at.

    Attributes:
        model: The original module.
        program: The program that must compute the same.
        root: The module tree that the program runs on.
        control: The control of its sites.
        call: The example call, opened.
        plan: The plan that the program follows.
    """

    model: nn.Module
    program: Program
    root: nn.Module
    control: PruningControl
    call: Call
    plan: Plan

    def macs(self) -> float:
        """Multiply-accumulates per sample with pruning off."""
        return self.program.dense_macs(self.call.flat()[0])

    def trains(self) -> bool:
        """Whether the model, or a part of it, is in training mode."""
        return is_training(self.model)

    @cached_property
    def alone(self) -> SampleAlone | None:
        """The first sample by itself; None if it cannot be cut out of the call, or is not taken by model and program."""
        if not free_batch(self.program.dynamic, self.call.flat()[0]):
            return None
        call = first_sample(self.call)
        if not self.program.serves(call.flat()[0]):
            return None
        try:
            return SampleAlone(call, unpruned_runs(self, call)[0]())
        except Exception:  # group norms of one position refuse a single sample
            return None


def graph_is_sound(case: Case) -> None:
    """The graph is well formed and names only modules and parameters that exist."""
    case.program.graph.lint()
    for node in case.program.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            try:
                attribute(case.root, str(node.target))
            except AttributeError:
                raise RewriteError(f"the graph names {node.target}, which the model does not have.") from None


def inactive_equals_original(case: Case) -> None:
    """With pruning off, the program computes what the model computes, for the example's batch and for one sample."""
    if not values_are_comparable(case.model, case.call.tensors()):
        return
    original, rewritten = unpruned_runs(case, case.call)
    require_agreement(original, rewritten)
    if is_cheap(case) and not case.trains() and case.alone is not None:
        original_alone, rewritten_alone = unpruned_runs(case, case.alone.call)
        try:
            require_agreement(starting_with(case.alone.expected, original_alone), rewritten_alone)
        except RewriteError:
            coupled = differences(pytree.tree_leaves(case.alone.expected), pytree.tree_leaves(original()))
            if not coupled:
                raise
            position, error = next(iter(coupled.items()))
            raise RewriteError(COUPLED.format(position, error)) from None


def unpruned_runs(case: Case, call: Call) -> tuple[Run, Run]:
    """Run the model, and the program with pruning off, on ``call``, without gradients."""

    def run(one: Callable[[Case, Call], object]) -> object:
        with torch.no_grad(), comparable_draws(case.model, call.tensors()):
            return one(case, call)

    return partial(run, _run_original), partial(run, _run_program)


def pruned_keeps_shapes(case: Case) -> None:
    """With pruning on, outputs have the structure, shapes and dtypes of the original's."""
    leaves = case.call.flat()[0]
    with torch.no_grad(), trial_run(case.root, leaves):
        pruned = case.program.run(case.root, leaves)
    for expected, actual in zip(_captured_outputs(case.program.graph), pytree.tree_leaves(pruned), strict=True):
        if isinstance(expected, Tensor) and tuple(example_size(n) for n in expected.shape) != tuple(actual.shape):
            raise RewriteError(f"an output has shape {tuple(actual.shape)}, the model's has {tuple(expected.shape)}.")


def decisions_hold(case: Case) -> None:
    """With pruning on, one decision gives one result, however it is carried out (see ``replay.py``)."""
    misaligned = case.control.config.mask_order == "sorted"
    if case.trains() or not is_cheap(case) or misaligned:
        return
    dropping_equals_hiding(case.program, case.root, case.control, case.call)
    if case.control.config.batching == "ragged" and case.alone is not None:
        batch_mates_do_not_matter(case.program, case.root, case.control, case.call, case.plan)


def is_cheap(case: Case) -> bool:
    """Whether the model is small enough to be run more often."""
    return case.macs() < EXPENSIVE


def _captured_outputs(graph: fx.Graph) -> list[object]:
    """Captured value of each output; None where it is a constant."""
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, (list, tuple))
    return [n.meta.get("val") if isinstance(n, fx.Node) else None for n in outputs]


def note_lost_gradients(case: Case) -> None:
    """Let the program of a case know which gradients it loses."""
    if not case.program.own_backward and is_cheap(case):
        call = case.call if case.trains() or case.alone is None else case.alone.call
        case.program.lost_gradients = lost_gradients(
            case.model, call, partial(_run_original, case), partial(_run_program, case)
        )


def _run_original(case: Case, call: Call) -> object:
    """What the model returns, and what it writes to tensors."""
    with trial_run(case.model, (call.args, call.kwargs)) as trial, spelled_out():
        result = case.model(*call.args, **call.kwargs)
    case.program.fills |= trial.filled
    return result, trial.written


def _run_program(case: Case, call: Call) -> object:
    leaves = call.flat()[0]
    with trial_run(case.root, leaves) as trial, case.control.unpruned():
        result = case.program.run(case.root, leaves)
    return result, trial.written


CHECKS: tuple[tuple[str, Callable[[Case], None]], ...] = (
    ("the graph is sound", graph_is_sound),
    ("pruning off equals the original", inactive_equals_original),
    ("pruning keeps output shapes", pruned_keeps_shapes),
    ("decisions hold", decisions_hold),
)


def verify(case: Case) -> None:
    """Run all checks.

    Raises:
        RewriteError: One of them fails.
    """
    for name, check in CHECKS:
        try:
            check(case)
        except RewriteError:
            raise
        except OtherBranch:  # for one sample of the example: another program will serve such calls
            continue
        except Exception as error:
            raise RewriteError(f"the check '{name}' failed: {type(error).__name__}: {error}") from error
