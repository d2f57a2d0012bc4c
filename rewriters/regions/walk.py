"""The walk down a module tree to the largest submodules that can be rewritten: start at :class:`RegionWalk`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from madtp.calls.batch import are_free, sample_dims
from madtp.calls.call import Call
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
from rewriters.capture.scope import Region
from rewriters.pipeline import RewrittenRegion, rewrite_region
from rewriters.plan.plan import Plan, Refusal, SitePlan
from rewriters.plan.policy import Policy
from rewriters.plan.request import Request
from rewriters.regions.chains import ChainOfBlocks, chains_in
from rewriters.regions.rewritten import RewrittenRegions, site_count
from rewriters.verify.payoff import why_nothing_is_saved

MOST_ATTEMPTS = 40
# After so many modules of one class that cannot be captured, its others are not tried.
MOST_FAILURES_OF_A_CLASS = 2
STATE = "a {} holds what later calls read again, so tokens dropped now would be missed then"
ONE_IMAGE = "give it one image a call, or prune other parts only"
WITHOUT_CACHE = "call it without the cache (an argument like use_cache=False), or prune other parts only"
SEE_REASON = "see the reason"
REPORT = "please report the model"


class RegionWalk:
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
        """Make a region of ``module``; or of its children, where they have more sites, or as many and serve any batch."""
        regions, refusals = len(self.regions), len(self.refusals)
        result = self._try(path, module, recorded)
        frozen = isinstance(result, RewrittenRegion) and _freezes_batch(result)
        if result is None or (isinstance(result, RewrittenRegion) and not (_misses_blocks(result) or frozen)):
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
        freer = frozen and not any(map(_freezes_batch, found))
        if site_count(found) + freer > own + site_count(apart):
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
            return Refusal(path, "", str(error), SEE_REASON, policy_of(error))
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
            some = len(sites) < len(plan.sites) and holds_whole_streams(plan, place)
            if recorded is not None and some and _serves_alone(recorded, sites):
                yield recorded.region(place)
            else:
                yield from self._inner(place, child, plan)


def _misses_blocks(region: RewrittenRegion) -> bool:
    """Whether a region leaves blocks unpruned that the configuration does not leave out."""
    return any(refusal.policy is not Policy.LAYERS for refusal in region.plan.refusals)


def _freezes_batch(region: RewrittenRegion) -> bool:
    """Whether the program of a region serves only batches of the size that it was captured with."""
    leaves = region.call.flattened(region.program.given).flat()[0]
    dims = sample_dims(leaves)
    return dims is not None and not are_free(dims, region.program.dynamic)


def _serves_alone(recorded: RecordedCall, sites: tuple[SitePlan, ...]) -> bool:
    """Whether a module that is called like this can prune at ``sites`` by itself."""
    if recorded.state is not None or recorded.attentions < 2:
        return False
    return recorded.image_positions is not None or not any(site.segments for site in sites)


def holds_whole_streams(plan: Plan, path: str) -> bool:
    """Whether no stream has sites both in the module at ``path`` and outside of it."""
    inside = Region(path).holds
    streams = [{site.stream for site in plan.sites if inside(site.name) is there} for there in (True, False)]
    return streams[0].isdisjoint(streams[1])


def policy_of(error: MadtpError) -> Policy | None:
    return Policy.LANGUAGE_MODEL if isinstance(error, LeftAloneError) else None
