"""Regions: which submodules of a model are rewritten where it does not export whole, or where Python stays in charge.

Start at :func:`rewrite_regions`. The whole model is tried first, unless it has a ``generate`` method, which may call its
submodules in any way. Otherwise the model is run once, and a walk goes down its module tree to the largest submodules
that export as they were called there, and that hold transformer blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
from rewriters.capture.recording import RecordedCall, record
from rewriters.capture.scope import WHOLE, Region
from rewriters.pipeline import RewrittenRegion, rewrite_region
from rewriters.plan.plan import Plan, Refusal, SitePlan, joined
from rewriters.plan.policy import Policy
from rewriters.plan.request import Request
from rewriters.regions.chains import ChainOfBlocks, chains_in, why_no_chain
from rewriters.verify.payoff import why_nothing_is_saved

MOST_ATTEMPTS = 40
# After so many modules of one class that cannot be captured, its others are not tried.
MOST_FAILURES_OF_A_CLASS = 2
STATE = "a {} holds what later calls read again, so tokens dropped now would be missed then"
ONE_IMAGE = "give it one image a call, or prune other parts only"
WITHOUT_CACHE = "call it without the cache (an argument like use_cache=False), or prune other parts only"
SEE_REASON = "see the reason"
REPORT = "please report the model"


def site_count(regions: Iterable[RewrittenRegion]) -> int:
    """The number of sites of several regions."""
    return sum(len(region.plan.sites) for region in regions)


@dataclass
class RewrittenRegions:
    """All rewritten regions of a model: the model itself, or submodules of it.

    A model whose images are computed one by one is a region like others, at the path of the whole.

    Attributes:
        regions: The rewritten regions.
        refusals: Refusals of submodules that are not rewritten.
    """

    regions: list[RewrittenRegion]
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the one region is the model itself, as it is called."""
        return [r.region for r in self.regions] == [WHOLE]

    @property
    def plan(self) -> Plan:
        """The plans of all regions as one."""
        return joined([r.plan for r in self.regions]).without((), self.refusals)


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
    walk: _Walk | None = None
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
        remarks = [] if isinstance(failure, LeftAloneError) else why_no_chain(walk.recording, model)
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
    unpruned = any(r.policy is not Policy.TOWERS for r in whole.plan.refusals)
    if request.plan is not None or not (texts or unpruned):
        return whole
    walk = _Walk(request, rejected)
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
        refusal = Refusal(name, "", str(error), SEE_REASON, _policy_of(error))
        return RewrittenRegions([], [*by_region.refusals, refusal])


def _policy_of(error: MadtpError) -> Policy | None:
    return Policy.LANGUAGE_MODEL if isinstance(error, LeftAloneError) else None


def _neither(model: str, failure: MadtpError, refusals: list[Refusal]) -> MadtpError:
    """The error where the model can be rewritten neither as a whole (``failure``) nor by regions."""
    if not refusals or (isinstance(failure, LeftAloneError) and all(r.policy is not None for r in refusals)):
        return failure
    reasons = [f"{r.block}: {r.reason}" for r in refusals]
    message = f"{failure} Nor can its submodules be rewritten: {' | '.join(reasons[:6])}"
    if any(r.policy is not None for r in refusals):
        return LeftAloneError(message, [r.report() for r in (Refusal(model, "", str(failure), SEE_REASON), *refusals)])
    return NoSiteError(message) if isinstance(failure, LeftAloneError) else type(failure)(message)


def _submodules(request: Request, rejected: Mapping[str, str]) -> _Walk:
    walk = _Walk(request, rejected)
    walk.down("", request.model)
    return walk


def single_modality_towers(module: nn.Module, plan: Plan, path: str = "") -> Iterator[str]:
    """Paths of the largest submodules that hold all sites of their streams, which are of one modality."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        sites = plan.of(Region(place)).sites
        complete = _holds_whole_streams(plan, place) and not any(site.segments for site in sites)
        if sites and complete and len({site.modality for site in sites}) == 1:
            yield place
        elif sites:
            yield from single_modality_towers(child, plan, place)


def _holds_whole_streams(plan: Plan, path: str) -> bool:
    """Whether no stream has sites both in the module at ``path`` and outside of it."""
    inside = Region(path).holds
    streams = [{site.stream for site in plan.sites if inside(site.name) is there} for there in (True, False)]
    return streams[0].isdisjoint(streams[1])


def region_at(model: nn.Module, call: Call, path: str) -> Region:
    """The submodule at ``path`` as a region, as ``model`` calls it in ``call``.

    Raises:
        RewriteError: The model does not call it.
    """
    recorded = record(model, call).calls.get(path)
    if recorded is None:
        raise RewriteError(f"the example call does not call {path}, so it is not known what reads its results.")
    return Region(path, modalities=recorded.modalities, read_positions=tuple(sorted(recorded.read_positions)))


class _Walk:
    """A walk down a module tree that rewrites what it can."""

    def __init__(self, request: Request, rejected: Mapping[str, str]) -> None:
        self.request, self.rejected = request, rejected
        self.recording = record(request.model, request.call)
        self.regions: list[RewrittenRegion] = []
        self.refusals: list[Refusal] = []
        self.attempts = 0
        self.failures: Counter[type[nn.Module]] = Counter()
        self.seen: set[int] = set()
        self.pruning_nothing: list[Region] = []

    def with_chains(self) -> RewrittenRegions:
        """The regions found, with chains of blocks beside them, and in place of regions that are single blocks.

        Raises:
            PlanError: The plan that was handed in has sites in no region.
        """
        taken = [*(one.region for one in self.regions), *self.pruning_nothing]
        blocks = {one.region.path for one in self.regions if len(one.plan.sites) == 1}
        for chain in chains_in(self.recording, self.request.model, taken, blocks):
            if not any(chain.overlaps(one.region) for one in self.regions):
                self._add_chain(chain)
        plan = self.request.plan
        if plan is not None and self.regions:
            lost = {s.name for s in plan.sites} - {s.name for r in self.regions for s in r.plan.sites}
            if lost:
                raise PlanError(
                    f"the plan has {len(lost)} sites that no region of this model holds ({sorted(lost)[0]}, ...); start from "
                    "the plan of a fresh rewrite."
                )
        return RewrittenRegions(self.regions, self.refusals)

    def _add_chain(self, chain: ChainOfBlocks) -> None:
        """Make a region of a chain, if it has no fewer sites than the regions in it."""
        around = [r for r in self.refusals if not r.node and chain.lies_in(r.block)]
        inside = [one for one in self.regions if chain.region.holds(one.region.path)]
        result = self._try_chain(chain)
        if isinstance(result, RewrittenRegion):
            if len(result.plan.sites) >= site_count(inside):
                others = [one for one in self.regions if not chain.region.holds(one.region.path)]
                self.regions = [*others, result]
                self.refusals = [r for r in self.refusals if r not in around]
        elif result is not None and not (around or inside):
            self.refusals.append(result)

    def _try_chain(self, chain: ChainOfBlocks) -> RewrittenRegion | Refusal | None:
        """Rewrite a chain, or say why not; None where there is nothing to prune in it."""
        name = chain.region.name
        if name in self.rejected:
            return Refusal(name, "", self.rejected[name], REPORT)
        if self.attempts >= MOST_ATTEMPTS:
            return Refusal(name, "", "others like it could not be captured", "rewrite it by itself")
        self.attempts += 1
        result = self._rewrite(chain.region.module(self.request.model), chain.region, chain.call)
        if isinstance(result, RewrittenRegion):
            reason = why_nothing_is_saved(result.program, result.call.flattened(result.program.given))
            return result if reason is None else Refusal(name, "", reason, SEE_REASON)
        return result

    def down(self, path: str, module: nn.Module) -> None:
        """Make regions of the children of ``module``, or of theirs."""
        for name, child in module.named_children():
            place = f"{path}.{name}" if path else name
            if id(child) in self.seen or not self._may_hold_sites(place, child):
                continue
            self.seen.add(id(child))
            recorded = self.recording.calls.get(place)
            if recorded is None:
                self.down(place, child)
                continue
            self._choose(place, child, recorded)

    def _choose(self, path: str, module: nn.Module, recorded: RecordedCall) -> None:
        """Make a region of ``module``, or of its children where they have more sites together."""
        regions, refusals = len(self.regions), len(self.refusals)
        result = self._try(path, module, recorded)
        if result is None or (isinstance(result, RewrittenRegion) and not result.plan.refusals):
            if result is not None:
                self.regions.append(result)
            else:
                self.pruning_nothing.append(Region(path))
            self._down_to_others(path, path, module)
            return
        self.down(path, module)
        found = self.regions[regions:]
        apart = [r for r in found if path not in self.recording.calls[r.region.path].callers]
        own = len(result.plan.sites) if isinstance(result, RewrittenRegion) else 0
        if site_count(found) > own + site_count(apart):
            return
        self.regions[regions:] = apart
        del self.refusals[refusals:]
        if isinstance(result, RewrittenRegion):
            self.regions.append(result)
        else:
            self.refusals.append(result)

    def _down_to_others(self, region: str, path: str, module: nn.Module) -> None:
        """Make regions of modules that lie inside ``region``, but run outside of its calls: a tower that the host calls."""
        for name, child in module.named_children():
            place = f"{path}.{name}"
            recorded = self.recording.calls.get(place)
            if recorded is None or region in recorded.callers:
                self._down_to_others(region, place, child)
            elif id(child) not in self.seen and self._may_hold_sites(place, child):
                self.seen.add(id(child))
                self._choose(place, child, recorded)

    def _plan_inside(self, region: Region) -> Plan | None:
        """The part of a plan that was handed in for what runs in calls of a region."""
        if self.request.plan is None:
            return None
        path, plan = region.path, self.request.plan.of(region)
        if region.chain is not None:
            return plan
        calls = self.recording.calls.items()
        apart = [Region(p) for p, r in calls if Region(path).holds(p) and p != path and path not in r.callers]
        return plan.without([s.name for s in plan.sites if any(region.holds(s.name) for region in apart)], ())

    def _may_hold_sites(self, path: str, module: nn.Module) -> bool:
        recorded = self.recording.calls.get(path)
        if recorded is None:
            return any(True for _ in module.children())
        # In a region with one attention no other one would see fewer tokens.
        if recorded.attentions < 2:
            return False
        return self.request.plan is None or bool(self.request.plan.of(Region(path)).sites)

    def _try(self, path: str, module: nn.Module, recorded: RecordedCall) -> RewrittenRegion | Refusal | None:
        """Rewrite one module, or say why not; None where there is nothing to prune in it."""
        if path in self.rejected:
            return Refusal(path, "", self.rejected[path], REPORT)
        if recorded.state is not None:
            return Refusal(path, "", STATE.format(recorded.state), WITHOUT_CACHE)
        if self.attempts >= MOST_ATTEMPTS or self.failures[type(module)] >= MOST_FAILURES_OF_A_CLASS:
            return Refusal(path, "", "others like it could not be captured", "rewrite it by itself")
        region, call = recorded.region(path), recorded.call
        if recorded.image_positions is not None:
            call = call.with_image_positions(recorded.image_positions.positions)
        self.attempts += 1
        result = self._rewrite(module, region, call)
        if isinstance(result, RewrittenRegion) or (result is not None and result.policy is not None):
            return result
        try:
            found = per_image_call(module, recorded.call)
        except RewriteError as error:
            return Refusal(path, "", why_not_per_image(module, error), ONE_IMAGE)
        if found is None:
            return result
        return self._rewrite(module, replace(region, per_image=found.per_image), found.call)

    def _rewrite(self, module: nn.Module, region: Region, call: Call) -> RewrittenRegion | Refusal | None:
        plan = self._plan_inside(region)
        if plan is not None and not plan.sites:
            return None
        request = replace(self.request, model=module, call=call, region=region, serial=len(self.regions), plan=plan)
        path = region.name
        try:
            rewritten = rewrite_region(request)
        except NothingToPruneError:
            return None
        except NoSiteError as error:
            return Refusal(path, "", str(error), SEE_REASON, _policy_of(error))
        except (CaptureError, ExampleInputsError) as error:
            self.failures[type(module)] += 1
            return Refusal(path, "", str(error), "an exportable module")
        except (RewriteError, PlanError) as error:
            return Refusal(path, "", str(error), REPORT)
        if region.chain is not None:
            return rewritten
        return replace(rewritten, inner=tuple(self._inner(path, module, rewritten.plan)))

    def _inner(self, path: str, module: nn.Module, plan: Plan) -> Iterator[Region]:
        """The largest submodules that hold some of the streams, and all of these.

        Their streams are of one modality, or the image positions in them are known.
        """
        for name, child in module.named_children():
            place = f"{path}.{name}" if path else name
            recorded, sites = self.recording.calls.get(place), plan.of(Region(place)).sites
            if not sites:
                continue
            some = len(sites) < len(plan.sites) and _holds_whole_streams(plan, place)
            if recorded is not None and some and _serves_alone(recorded, sites):
                yield recorded.region(place)
            else:
                yield from self._inner(place, child, plan)


def _serves_alone(recorded: RecordedCall, sites: tuple[SitePlan, ...]) -> bool:
    """Whether a module that is called like this can prune at ``sites`` by itself."""
    if recorded.state is not None or recorded.attentions < 2:
        return False
    return recorded.image_positions is not None or not any(site.segments for site in sites)
