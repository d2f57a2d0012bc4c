"""Rewrite a model: choose regions and rewrite them, assemble the pruned model, verify it.

Start at :func:`rewrite_model`, which :func:`madtp.rewrite` calls. ``choice.py`` chooses what is rewritten,
``pipeline.py`` holds the stages for one region, ``assembly.py`` puts the programs into the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from madtp.calls.call import Call
from madtp.calls.copies import share
from madtp.calls.double_precision import in_double_precision
from madtp.calls.hooks import without_hooks
from madtp.calls.progress_line import stage
from madtp.config import PruningConfig
from madtp.errors import RewriteError
from madtp.programs.lost_gradients import lost_gradients_remark
from madtp.pruned import PrunedModel
from madtp.sites.preserved_state import trial_run
from rewriters.capture.own_hooks import needed_hooks
from rewriters.pipeline import RewrittenRegion
from rewriters.plan.chosen_layers import layers_not_found
from rewriters.plan.plan import Plan
from rewriters.plan.request import Request
from rewriters.regions.assembly import assemble
from rewriters.regions.choice import rewrite_regions
from rewriters.regions.counted_numbers import Place, counted_by, why_not_counted
from rewriters.regions.fault import region_at_fault
from rewriters.regions.rewritten import RewrittenRegions
from rewriters.regions.stored_state import StoredAttribute, stored_by, stored_note, why_not_rewritten
from rewriters.verify.checks import Case, note_lost_gradients, verify
from rewriters.verify.payoff import saving_of, sites_without_payoff
from rewriters.verify.rounding import is_rounding

WITHOUT_PAYOFF = (
    "on inputs like the example, pruning costs more than it can save from {} on: there are fewer tokens, or narrower ones, "
    "than {} alignment tokens pay for; lower alignment_tokens, set alignment=False, or leave these streams out (towers)"
)


def rewrite_model(model: nn.Module, call: Call, config: PruningConfig, plan: Plan | None = None) -> PrunedModel:
    """The model rewritten as a whole, or by those regions that pass the checks.

    Args:
        model: The model; it is not modified.
        call: The example call.
        config: How to prune.
        plan: An edited plan to follow.

    Raises:
        MadtpError: Neither the model nor a region of it can be rewritten.
    """
    request = Request(model, call, config, plan=plan)
    # Hooks of the user are not to see what tracing computes; calls while there are any run as the original does.
    own_hooks = needed_hooks(model, call)
    bare = without_hooks(model, own_hooks)
    stored, counted = stored_by(bare, call), counted_by(bare, call)
    rejected: dict[str, str] = {}
    # Each round captures afresh, without the regions that failed a check.
    while True:
        rewritten = rewrite_regions(replace(request, model=share(bare)), rejected)
        keeping = _keeping_state(rewritten, stored, counted)
        if keeping:
            rejected |= keeping
            continue
        pruned = assemble(request, rewritten, own_hooks, stored)
        failure = _verify(bare, pruned, rewritten, call)
        if failure is None:
            _note_missing_payoff(pruned, rewritten, config)
            lost = stored_note(stored, [one.region for one in rewritten.regions])
            if lost is not None:
                pruned.madtp.notes.add(lost)
            for remark in layers_not_found(config, rewritten.plan.sites):
                pruned.madtp.notes.add(remark)
            return pruned
        rejected[failure.name] = failure.reason


def _keeping_state(
    rewritten: RewrittenRegions, stored: Sequence[StoredAttribute], counted: Sequence[Place]
) -> dict[str, str]:
    """Names of the regions whose modules keep state between calls, with the reason why they are not rewritten."""
    reasons = {
        one.region.name: why_not_rewritten(stored, one.region) or why_not_counted(counted, one.region)
        for one in rewritten.regions
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


@dataclass(frozen=True)
class FailedRegion:
    """A rewritten region, or the whole model (name ``""``), that does not compute what it should."""

    name: str
    reason: str


def _verify(model: nn.Module, pruned: PrunedModel, rewritten: RewrittenRegions, call: Call) -> FailedRegion | None:
    """Check each region by itself, then the model with all of them; returns the first region that fails.

    Raises:
        RewriteError: The regions do not fit the model.
    """
    known = len(pruned.madtp.report.unpruned)
    for region in rewritten.regions:
        case = _case(model, pruned, region)
        try:
            saving_of(region.program, region.call.flattened(region.program.given))
        except RewriteError as error:
            return FailedRegion(region.region.name, str(error))
        stage(f"checking {region.region.name or type(model).__name__}")
        try:
            verify(case)
        except RewriteError as error:
            if not is_rounding(case, partial(_case_in_double_precision, model, pruned, region)):
                return FailedRegion(region.region.name, str(error))
        note_lost_gradients(case)
        if region.program.lost_gradients:
            pruned.madtp.notes.add(f"in training, {lost_gradients_remark(region.program.lost_gradients)}")
    if rewritten.whole:
        return None
    with torch.no_grad(), trial_run(pruned, (call.args, call.kwargs)), pruned.madtp.dense():
        pruned(*call.args, **call.kwargs)
    pruned.madtp.control.clear_record()
    unpruned = pruned.madtp.report.unpruned[known:]
    if not unpruned:
        return None
    if any(unpruned[0].called == region.region.name for region in rewritten.regions):
        return FailedRegion(unpruned[0].called, str(unpruned[0]))
    at_fault = region_at_fault(pruned, [region.region for region in rewritten.regions], call)
    if at_fault is not None:
        return FailedRegion(at_fault.name, unpruned[0].reason)
    raise RewriteError(f"the rewritten regions do not fit the model. {unpruned[0]}")


def _case(model: nn.Module, pruned: PrunedModel, region: RewrittenRegion) -> Case:
    original = region.region.module(model)
    opened = Request(original, region.call, pruned.madtp.config, region.region).opened(region.program.sizes())
    return Case(
        model=opened.model,
        program=region.program,
        root=without_hooks(pruned, pruned.madtp.own_hooks),
        control=pruned.madtp.control,
        call=opened.call,
        plan=region.plan,
    )


def _case_in_double_precision(model: nn.Module, pruned: PrunedModel, region: RewrittenRegion) -> Case:
    """The case of copies in double precision."""
    # Copied together, they go on sharing their parameters.
    exact_model, exact_pruned = copy.deepcopy((model, pruned))
    return _case(exact_model.double(), exact_pruned.double(), replace(region, call=in_double_precision(region.call)))


def _note_missing_payoff(pruned: PrunedModel, rewritten: RewrittenRegions, config: PruningConfig) -> None:
    names: list[str] = []
    for region in rewritten.regions:
        call = region.call.flattened(region.program.given)
        saving = saving_of(region.program, call)
        if saving.is_missing:
            pruned.madtp.notes.add(str(saving))
            continue
        names += sites_without_payoff(region.program, call, region.plan.sites, config)
    if names:
        pruned.madtp.notes.add(WITHOUT_PAYOFF.format(", ".join(names), config.alignment_tokens))
