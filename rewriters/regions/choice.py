"""Regions: which submodules of a model are rewritten where it does not export whole, or where Python stays in charge.

Start at :func:`rewrite_regions`. The whole model is tried first, unless it has a ``generate`` method, which may call its
submodules in any way. Otherwise the model is run once, and a walk (``walk.py``) goes down its module tree to the largest
submodules that export as they were called there, and that hold transformer blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import nn

from madtp.calls.call import Call
from madtp.calls.texts import holds_texts
from madtp.errors import (
    CaptureError,
    ExampleInputsError,
    LeftAloneError,
    MadtpError,
    NoSiteError,
    NothingToPruneError,
    PlanError,
    RewriteError,
)
from rewriters.capture.packed_images import per_image_call, why_not_per_image
from rewriters.capture.recording import record
from rewriters.capture.scope import WHOLE, Region
from rewriters.pipeline import rewrite_region
from rewriters.plan.plan import Plan, Refusal
from rewriters.plan.policy import Policy
from rewriters.plan.request import Request
from rewriters.regions.chains import why_no_chain
from rewriters.regions.rewritten import RewrittenRegions, site_count
from rewriters.regions.walk import ONE_IMAGE, REPORT, SEE_REASON, RegionWalk, holds_whole_streams, policy_of


def rewrite_regions(request: Request, rejected: Mapping[str, str] = MappingProxyType({})) -> RewrittenRegions:
    """Rewrite a model as a whole or by regions.

    Args:
        request: The request for the whole model.
        rejected: Names of regions (the whole model is ``""``) that failed a check, with the reason; what lies below them
            is tried.

    Raises:
        MadtpError: As :func:`rewriters.pipeline.rewrite_region`, where neither works.
    """
    model = request.model
    walk: RegionWalk | None = None
    if callable(getattr(model, "generate", None)):
        walk = _submodules(request, rejected)
        if walk.regions:
            return walk.with_chains()
    failure: MadtpError = RewriteError(rejected.get("", ""))
    if "" not in rejected:
        try:
            whole = RewrittenRegions([rewrite_region(request)])
        except (CaptureError, RewriteError, PlanError) as error:
            failure = error
        else:
            return _better(request, rejected, whole)
    walk = walk or _submodules(request, rejected)
    by_region = walk.with_chains()
    if not by_region.regions and "" not in rejected:
        by_region = _per_image(request, by_region)
    if not by_region.regions:
        chosen = isinstance(failure, (LeftAloneError, NothingToPruneError))
        remarks = [] if chosen else why_no_chain(walk.recording, model)
        raise _neither(type(model).__name__, failure, [*by_region.refusals, *remarks]) from failure.__cause__
    if "" in rejected:
        by_region.refusals.insert(0, Refusal(type(model).__name__, "", rejected[""], REPORT))
    return by_region


def _better(request: Request, rejected: Mapping[str, str], whole: RewrittenRegions) -> RewrittenRegions:
    """``whole``, or regions where these have more sites, or as many and the call holds texts.

    They are tried if it does, or if some blocks of the whole are left unpruned and a run of the model shows image features
    among text, which its graph may not show.
    """
    texts = holds_texts(request.call)
    unpruned = any(r.policy not in (Policy.TOWERS, Policy.LAYERS) for r in whole.plan.refusals)
    if request.plan is not None or not (texts or unpruned):
        return whole
    walk = RegionWalk(request, rejected)
    if not texts and all(recorded.image_positions is None for recorded in walk.recording.calls.values()):
        return whole
    walk.down("", request.model)
    wanted, found = site_count(whole.regions) + (not texts), walk.with_chains()
    return found if site_count(found.regions) >= wanted else whole


def _per_image(request: Request, by_region: RewrittenRegions) -> RewrittenRegions:
    """The whole model as a region whose images are computed one by one; ``by_region``, with the reason, if it cannot be."""
    model, name = request.model, type(request.model).__name__
    try:
        found = per_image_call(model, request.call)
    except RewriteError as error:
        refusal = Refusal(name, "", why_not_per_image(model, error), ONE_IMAGE)
        return RewrittenRegions([], [*by_region.refusals, refusal])
    if found is None:
        return by_region
    region = replace(WHOLE, per_image=found.per_image)
    try:
        return RewrittenRegions([rewrite_region(replace(request, call=found.call, region=region))])
    except (CaptureError, ExampleInputsError, RewriteError, PlanError) as error:
        refusal = Refusal(name, "", str(error), SEE_REASON, policy_of(error))
        return RewrittenRegions([], [*by_region.refusals, refusal])


def _neither(model: str, failure: MadtpError, refusals: list[Refusal]) -> MadtpError:
    """The error where the model can be rewritten neither as a whole (``failure``) nor by regions."""
    if not refusals or (isinstance(failure, LeftAloneError) and all(r.policy is not None for r in refusals)):
        return failure
    reasons = [f"{r.block}: {r.reason}" for r in refusals]
    message = f"{failure} Nor can its submodules be rewritten: {' | '.join(reasons[:6])}"
    if any(r.policy is not None for r in refusals):
        return LeftAloneError(message, [r.report() for r in (Refusal(model, "", str(failure), SEE_REASON), *refusals)])
    return NoSiteError(message) if isinstance(failure, LeftAloneError) else type(failure)(message)


def _submodules(request: Request, rejected: Mapping[str, str]) -> RegionWalk:
    walk = RegionWalk(request, rejected)
    walk.down("", request.model)
    return walk


def single_modality_towers(module: nn.Module, plan: Plan, path: str = "") -> Iterator[str]:
    """Paths of the largest submodules that hold all sites of their streams, which are of one modality."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        sites = plan.of(Region(place)).sites
        complete = holds_whole_streams(plan, place) and not any(site.segments for site in sites)
        if sites and complete and len({site.modality for site in sites}) == 1:
            yield place
        elif sites:
            yield from single_modality_towers(child, plan, place)


def region_at(model: nn.Module, call: Call, path: str) -> Region:
    """The submodule at ``path`` as a region, as ``model`` calls it in ``call``.

    Raises:
        RewriteError: The model does not call it.
    """
    recorded = record(model, call).calls.get(path)
    if recorded is None:
        raise RewriteError(f"the example call does not call {path}, so it is not known what reads its results.")
    return Region(path, modalities=recorded.modalities, read_positions=tuple(sorted(recorded.read_positions)))
