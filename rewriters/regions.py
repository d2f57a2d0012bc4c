"""Regions: rewrite the submodules of a model that does not export whole, or whose Python has to stay in charge.

Start at :func:`build_all`. The whole model is tried first, but for one with a ``generate`` method, which calls its
submodules as it likes. Otherwise the model is run once, and the walk goes down its module tree to the largest
submodules that export as they were called there, and that hold transformer blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import nn

from madtp.calls.call import Call
from madtp.config import PruningConfig
from madtp.errors import (
    CaptureError,
    ExampleInputsError,
    MadtpError,
    NoSiteError,
    NothingToPruneError,
    PlanError,
    RewriteError,
)
from rewriters.capture.per_image import apart_of, refusal
from rewriters.capture.recording import Recorded, Recording, record
from rewriters.capture.scope import WHOLE, Region
from rewriters.pipeline import Rewritten, build
from rewriters.plan.plan import Plan, Refusal, joined

ATTEMPTS = 40
# After so many modules of one class that cannot be captured, its others are not tried.
OF_ONE_CLASS = 2
STATE = "a {} holds what later calls read again, so tokens dropped now would be missed then"
ONE = "give it one image a call, or prune other parts only"
WITHOUT = "call it without the cache (an argument like use_cache=False), or prune other parts only"


@dataclass
class Part:
    """One rewritten part of a model, with the call it was captured from.

    inner: regions in it that hold streams of their own, or can be told of the tokens that others write. They serve when the
    host calls them by themselves, or when the part runs as the original does.
    """

    rewritten: Rewritten
    call: Call
    inner: tuple[Region, ...] = ()

    @property
    def region(self) -> Region:
        """Where it lies."""
        return self.rewritten.region


@dataclass
class Parts:
    """All rewritten parts of a model: itself, or regions of it. refusals: of submodules that are left alone.

    A model whose calls are taken apart into images is a region like others, at the path of the whole.
    """

    parts: list[Part]
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the one part is the model itself, as it is called."""
        return [p.region for p in self.parts] == [WHOLE]

    @property
    def plan(self) -> Plan:
        """The plans of all parts as one."""
        plan = joined([p.rewritten.plan for p in self.parts])
        return plan.without((), self.refusals)


def build_all(
    host: nn.Module,
    call: Call,
    config: PruningConfig,
    plan: Plan | None = None,
    wrong: Mapping[str, str] = MappingProxyType({}),
) -> Parts:
    """Rewrite ``host`` as a whole or by regions.

    Args:
        wrong: regions (the whole model is "") that failed a check, with the reason; what lies below them is tried.
    Raises:
        MadtpError: as :func:`rewriters.pipeline.build`, where neither works.
    """
    regions: Parts | None = None
    if callable(getattr(host, "generate", None)):
        regions = _by_regions(host, call, config, plan, wrong)
        if regions.parts:
            return regions
    failure: MadtpError = RewriteError(wrong.get("", ""))
    if "" not in wrong:
        try:
            return Parts([Part(build(host, call, config, plan=plan), call)])
        except (CaptureError, RewriteError, PlanError) as error:
            failure = error
    if regions is None:
        regions = _by_regions(host, call, config, plan, wrong)
    if not regions.parts and "" not in wrong:
        regions = _of_images(host, call, config, plan, regions)
    if not regions.parts:
        raise _neither(failure, regions) from failure.__cause__
    if "" in wrong:
        regions.refusals.insert(0, Refusal(type(host).__name__, "", wrong[""], "please report the model"))
    return regions


def _of_images(host: nn.Module, call: Call, config: PruningConfig, plan: Plan | None, regions: Parts) -> Parts:
    """The whole model as a region whose calls are taken apart into images; ``regions`` with the reason where it cannot be."""
    try:
        found = apart_of(host, call)
    except RewriteError as error:
        return Parts([], [*regions.refusals, Refusal(type(host).__name__, "", refusal(host, error), ONE)])
    if found is None:
        return regions
    region = replace(WHOLE, apart=found.apart)
    try:
        return Parts([Part(build(host, found.call, config, region=region, plan=plan), found.call)])
    except (CaptureError, ExampleInputsError, RewriteError, PlanError) as error:
        reason = Refusal(type(host).__name__, "", str(error), "see the reason", by_policy=error.left_alone)
        return Parts([], [*regions.refusals, reason])


def _neither(error: MadtpError, found: Parts) -> MadtpError:
    reasons = [f"{r.block}: {r.reason}" for r in found.refusals]
    if not reasons:
        return error
    both = type(error)(f"{error} Nor can its submodules be rewritten: {' | '.join(reasons[:6])}")
    both.left_alone = any(r.by_policy for r in found.refusals)
    return both


def _by_regions(
    host: nn.Module, call: Call, config: PruningConfig, plan: Plan | None, wrong: Mapping[str, str]
) -> Parts:
    walk = _Walk(host, record(host, call), config, plan, wrong)
    walk.down("", host)
    if plan is not None and walk.parts:
        lost = {s.name for s in plan.sites} - {s.name for p in walk.parts for s in p.rewritten.plan.sites}
        if lost:
            raise PlanError(
                f"the plan has {len(lost)} sites that no region of this model holds ({sorted(lost)[0]}, ...); start from the "
                "plan of a fresh rewrite."
            )
    return Parts(walk.parts, walk.refusals)


def towers(module: nn.Module, plan: Plan, path: str = "") -> Iterator[str]:
    """Paths of the largest submodules that hold all sites of their streams, which are of one modality."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        sites = plan.of(Region(place)).sites
        others = {site.stream for site in plan.sites if site not in sites}
        apart = others.isdisjoint(site.stream for site in sites) and not any(site.segments for site in sites)
        if sites and apart and len({site.modality for site in sites}) == 1:
            yield place
        elif sites:
            yield from towers(child, plan, place)


def region_at(host: nn.Module, call: Call, path: str) -> Region:
    """The submodule at ``path`` as a region, as ``host`` calls it in ``call``.

    Raises:
        RewriteError: it does not.
    """
    recorded = record(host, call).calls.get(path)
    if recorded is None:
        raise RewriteError(f"the example call does not call {path}, so it is not known what reads its results.")
    return Region(path, recorded.modalities, tuple(sorted(recorded.read)))


class _Walk:
    """The walk down a module tree."""

    def __init__(
        self,
        host: nn.Module,
        recording: Recording,
        config: PruningConfig,
        plan: Plan | None,
        wrong: Mapping[str, str],
    ) -> None:
        self.host, self.recording, self.config, self.plan, self.wrong = host, recording, config, plan, wrong
        self.parts: list[Part] = []
        self.refusals: list[Refusal] = []
        self.attempts = 0
        self.failures: Counter[type[nn.Module]] = Counter()
        self.seen: set[int] = set()

    def down(self, path: str, module: nn.Module) -> None:
        """Make regions of the children of ``module``, or of theirs."""
        for name, child in module.named_children():
            place = f"{path}.{name}" if path else name
            if id(child) in self.seen or not self._worth_trying(place, child):
                continue
            self.seen.add(id(child))
            recorded = self.recording.calls.get(place)
            if recorded is None:
                self.down(place, child)
                continue
            self._choose(place, child, recorded)

    def _choose(self, path: str, module: nn.Module, recorded: Recorded) -> None:
        """Make a region of ``module``, or of its children where they have more sites together."""
        parts, refusals = len(self.parts), len(self.refusals)
        found = self._try(path, module, recorded)
        if found is None:
            return
        if isinstance(found, Part) and not found.rewritten.plan.refusals:
            self.parts.append(found)
            return
        self.down(path, module)
        below = sum(len(part.rewritten.plan.sites) for part in self.parts[parts:])
        own = len(found.rewritten.plan.sites) if isinstance(found, Part) else 0
        if below > own:
            return
        del self.parts[parts:], self.refusals[refusals:]
        if isinstance(found, Part):
            self.parts.append(found)
        else:
            self.refusals.append(found)

    def _worth_trying(self, path: str, module: nn.Module) -> bool:
        recorded = self.recording.calls.get(path)
        if recorded is None:
            return any(True for _ in module.children())
        # In a region with one attention no other one would see fewer tokens.
        if recorded.attentions < 2:
            return False
        return self.plan is None or bool(self.plan.of(Region(path)).sites)

    def _try(self, path: str, module: nn.Module, recorded: Recorded) -> Part | Refusal | None:
        """Rewrite one module, or say why not; None where there is nothing to prune in it."""
        if path in self.wrong:
            return Refusal(path, "", self.wrong[path], "please report the model")
        if recorded.state is not None:
            return Refusal(path, "", STATE.format(recorded.state), WITHOUT)
        if self.attempts >= ATTEMPTS or self.failures[type(module)] >= OF_ONE_CLASS:
            return Refusal(path, "", "others like it could not be captured", "rewrite it by itself")
        region, call = recorded.region(path), recorded.call
        if recorded.written is not None:
            call = call.with_image_positions(recorded.written[1])
        self.attempts += 1
        found = self._build(path, module, region, call)
        if isinstance(found, Part) or (found is not None and found.by_policy):
            return found
        try:
            apart = apart_of(module, recorded.call)
        except RewriteError as error:
            return Refusal(path, "", refusal(module, error), ONE)
        if apart is None:
            return found
        return self._build(path, module, replace(region, apart=apart.apart), apart.call)

    def _build(self, path: str, module: nn.Module, region: Region, call: Call) -> Part | Refusal | None:
        try:
            rewritten = build(
                module, call, self.config, region=region, serial=len(self.parts), plan=self._plan_of(region)
            )
        except NothingToPruneError:
            return None
        except NoSiteError as error:
            return Refusal(path, "", str(error), "see the reason", by_policy=error.left_alone)
        except (CaptureError, ExampleInputsError) as error:
            self.failures[type(module)] += 1
            return Refusal(path, "", str(error), "an exportable module")
        except (RewriteError, PlanError) as error:
            return Refusal(path, "", str(error), "please report the model")
        return Part(rewritten, call, tuple(self._inner(path, module, rewritten.plan)))

    def _inner(self, path: str, module: nn.Module, plan: Plan) -> Iterator[Region]:
        """The largest submodules that hold whole streams beside others, of one modality or told which token is of which."""
        for name, child in module.named_children():
            place = f"{path}.{name}" if path else name
            recorded, sites = self.recording.calls.get(place), plan.of(Region(place)).sites
            if not sites:
                continue
            others = {site.stream for site in plan.sites if site not in sites}
            apart = others and others.isdisjoint(site.stream for site in sites)
            known = recorded is not None and recorded.state is None and recorded.attentions > 1
            told = recorded is not None and recorded.written is not None
            if recorded is not None and known and apart and (told or not any(site.segments for site in sites)):
                yield recorded.region(place)
            else:
                yield from self._inner(place, child, plan)

    def _plan_of(self, region: Region) -> Plan | None:
        return None if self.plan is None else self.plan.of(region)
