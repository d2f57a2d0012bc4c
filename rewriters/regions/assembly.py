"""Assembly: the pruned model of all rewritten regions, and how it makes programs for calls of further kinds.

Start at :func:`assemble`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from madtp.calls.call import Call
from madtp.calls.copies import share
from madtp.calls.hooks import OwnHooks
from madtp.calls.record import record_call
from madtp.config import PruningConfig
from madtp.errors import NothingToPruneError, RewriteError
from madtp.programs.notes import Notes
from madtp.programs.originals import original_of
from madtp.programs.program import Program
from madtp.programs.program_builder import BuildProgram
from madtp.programs.program_cache import ProgramCache
from madtp.programs.pruned_methods import PrunedMethods
from madtp.programs.unwritten import UnwrittenAttributes
from madtp.pruned import AlignmentSpec, PrunedModel
from madtp.pruned.make import make_pruned, replace_forward, replace_forwards
from madtp.tokens.cache_marks import MarkedAxes
from rewriters.capture.scope import Region
from rewriters.insert.workspace import site_key
from rewriters.pipeline import RewrittenRegion, continue_region, rewrite_region
from rewriters.plan.request import Request
from rewriters.regions.choice import region_at, single_modality_towers
from rewriters.regions.reporting import report_of
from rewriters.regions.rewritten import RewrittenRegions
from rewriters.regions.stored_state import StoredAttribute, unwritten_attributes


def assemble(
    request: Request, rewritten: RewrittenRegions, own_hooks: OwnHooks, stored: Sequence[StoredAttribute] = ()
) -> PrunedModel:
    """The pruned model: a copy of the host's module tree in which programs run instead of the rewritten regions.

    Args:
        request: The request for the whole model.
        rewritten: Its regions.
        own_hooks: The hooks that are part of the model.
        stored: Where the model leaves tensors of samples as it runs.
    """
    model, config, plan = request.model, request.config, rewritten.plan
    pruned = make_pruned(
        share(model),
        sites={site_key(site.name): site.spec() for site in plan.sites},
        config=config,
        report=report_of(model, rewritten),
        alignment=AlignmentSpec(width=plan.alignment_width, images=plan.images, image_order=plan.image_order),
    )
    pruned.madtp.own_hooks = own_hooks
    for each in rewritten.regions:
        programs = _replaced(pruned, each.region, _builder(each, config, pruned.madtp.notes))
        _leave_unwritten(programs, each.region, stored)
        programs.add(each.program, each.call)
        for inner in each.inner:
            build = _inner_builder(each, config, inner, pruned.madtp.notes)
            inside = replace_forward(pruned, inner.path, build, inner=True, embeddings=inner.embeddings)
            _leave_unwritten(inside, inner, stored)
        if rewritten.whole:
            for path in single_modality_towers(pruned, plan):
                replace_forward(pruned, path, _tower_builder(each, config, pruned, path), inner=True)
            handle = pruned.madtp
            handle.methods = PrunedMethods(pruned, _method_builder(each, config), handle.control, handle.notes)
    pruned.madtp.example = record_call(request.call)
    return pruned


def _leave_unwritten(programs: ProgramCache, region: Region, stored: Sequence[StoredAttribute]) -> None:
    programs.unwritten = UnwrittenAttributes(unwritten_attributes(stored, region))
    programs.unwritten.mark(programs.host)  # before calls are told apart by what attributes hold


def _replaced(pruned: PrunedModel, region: Region, build: BuildProgram) -> ProgramCache:
    """The programs, still missing, that run in place of a region."""
    if region.chain is not None:
        return replace_forwards(pruned, region.chain, build, embeddings=region.embeddings)
    return replace_forward(pruned, region.path, build, embeddings=region.embeddings, per_image=region.per_image)


def _builder(rewritten: RewrittenRegion, config: PruningConfig, notes: Notes) -> BuildProgram:
    """What makes programs for calls of further kinds of a region, onto the sites that it has."""
    sites = frozenset(site.name for site in rewritten.plan.sites)

    def build(module: nn.Module, call: Call, serial: int, marked: Mapping[str, MarkedAxes]) -> Program:
        request = Request(module, call, config, region=rewritten.region, serial=serial, existing_sites=sites)
        if call.continues():
            return continue_region(request, marked)
        further = rewrite_region(request)
        if rewritten.inner and not further.plan.sites:
            paths = ", ".join(region.path for region in rewritten.inner)
            raise NothingToPruneError(f"{_lost(sorted(sites), further)}. {paths} may prune by themselves.")
        _note_lost_sites(further, sites, module, notes)
        return further.program

    return build


def _inner_builder(rewritten: RewrittenRegion, config: PruningConfig, inner: Region, notes: Notes) -> BuildProgram:
    """What makes programs for direct calls of a module inside a region, onto the sites that the region has there."""
    specs = {site.name: site.spec() for site in rewritten.plan.sites if inner.holds(site.name)}
    sites = frozenset(specs)

    def build(module: nn.Module, call: Call, serial: int, marked: Mapping[str, MarkedAxes]) -> Program:
        request = Request(module, call, config, region=inner, serial=serial, existing_sites=sites)
        if call.continues():
            return continue_region(request, marked)
        further = rewrite_region(request)
        if any(site.spec() != specs[site.name] for site in further.plan.sites):
            raise RewriteError(
                f"{inner.path} by itself would be pruned in another way than as a part of {rewritten.region.path}."
            )
        _note_lost_sites(further, sites, module, notes)
        return further.program

    return build


def _method_builder(rewritten: RewrittenRegion, config: PruningConfig) -> BuildProgram:
    """What makes programs for methods of a model that is rewritten whole, onto the sites that it has."""
    specs = {site.name: site.spec() for site in rewritten.plan.sites}

    def build(module: nn.Module, call: Call, serial: int, marked: Mapping[str, MarkedAxes]) -> Program:
        further = rewrite_region(Request(module, call, config, serial=serial, existing_sites=frozenset(specs)))
        if not further.plan.sites:
            raise NothingToPruneError("none of the sites of the model lies in what it computes")
        if any(site.spec() != specs[site.name] for site in further.plan.sites):
            raise RewriteError("by itself it would be pruned in another way than as a part of the model")
        return further.program

    return build


def _tower_builder(rewritten: RewrittenRegion, config: PruningConfig, pruned: PrunedModel, path: str) -> BuildProgram:
    """What makes programs for a tower of a model that is rewritten whole, for when a method of the model calls it."""

    def build(module: nn.Module, call: Call, serial: int, marked: Mapping[str, MarkedAxes]) -> Program:
        tower = region_at(original_of(pruned, pruned.madtp.own_hooks), rewritten.call, path)
        return _inner_builder(rewritten, config, tower, pruned.madtp.notes)(module, call, serial, marked)

    return build


def _note_lost_sites(further: RewrittenRegion, sites: frozenset[str], module: nn.Module, notes: Notes) -> None:
    lost = further.unpruned_sites(sites, module)
    if lost and not further.plan.sites:
        further.program.unpruned = _lost(lost, further)
    elif lost:
        notes.add(_lost(lost, further))


def _lost(sites: list[str], further: RewrittenRegion) -> str:
    reasons = {r.reason for r in further.plan.refusals if r.block in sites} or {"no attention found there"}
    return f"for this call signature nothing is pruned at {', '.join(sites)}: {'; '.join(sorted(reasons))}"
