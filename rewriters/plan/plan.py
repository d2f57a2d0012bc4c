"""The plan: where tokens will be pruned, as pure data.

Start at :class:`Plan`; ``make_plan.py`` makes one. It is frozen and goes through JSON unchanged, so it can be stored,
edited and handed back. Later stages decide nothing: what is not in the plan does not happen.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from madtp.errors import PlanError
from madtp.method.guidance import ImageOrder
from madtp.report import RefusalReport
from madtp.sites.scoring import Scores
from madtp.sites.spec import SegmentSpec, SiteSpec
from rewriters.capture.scope import Region
from rewriters.plan.policy import Policy, SegmentPlan

PLAN_VERSION = 1


@dataclass(frozen=True)
class PartPlan:
    """One operand of a concatenation along the tokens.

    Attributes:
        node: Name of its node.
        dim: Its token dimension.
        segment: Number of the segment that it belongs to.
        special: Positions of learned tokens in it.
    """

    node: str
    dim: int
    segment: int
    special: tuple[int, ...]


@dataclass(frozen=True)
class SitePlan:
    """One pruning site.

    Nodes are given by their names in the captured and canonicalised graph.

    Attributes:
        name: Unique name: the module path of the block, or ``block#2`` where the block runs a second time.
        modality: ``"image"``, ``"text"``, ``"joint"`` or ``"query"``.
        stream: Index of the residual stream.
        layer: Number of the block in its stream, from 0.
        width: Number of channels C of the stream.
        attention: Node of the block's self-attention.
        block_input: Node of the residual value that the queries come from.
        value: Node of the residual value behind the attention, whose tokens are pruned.
        token_dim: Token dimension of ``value``.
        batch_dim: Batch dimension of ``value``.
        norm: ``"pre"`` or ``"post"``.
        class_position: Position of the class token; None if there is none.
        protected: Constant positions that always survive; negative ones count from the end.
        readouts: Nodes whose values are positions that the graph reads, ``[B]`` or one number; ``"node+3"`` means three
            tokens further on. They survive, too.
        causal: Whether tokens see only earlier ones.
        segments: The segments of a stream that several modalities share.
        parts: How the segments were concatenated, if they were.
        mask: Node ``[B, N, ...]`` that is true at the positions of segment 1, if it was merged into segment 0 by a mask.
        keeps_last: Whether the last token of each sample that is not padding survives; a language model goes on from it.
        scores: What the block's attention shows of its tokens: ``"attention"`` (all of them), ``"windows"`` (those within
            a window of the grid), or ``"none"`` (its keys are not tokens).
    """

    name: str
    modality: str
    stream: int
    layer: int
    width: int
    attention: str
    block_input: str
    value: str
    token_dim: int
    batch_dim: int
    norm: str
    class_position: int | None
    protected: tuple[int, ...]
    readouts: tuple[str, ...]
    causal: bool
    segments: tuple[SegmentPlan, ...] = ()
    parts: tuple[PartPlan, ...] = ()
    mask: str | None = None
    keeps_last: bool = False
    scores: Scores = "attention"

    def spec(self) -> SiteSpec:
        """What the module of the site has to know."""
        return SiteSpec(
            name=self.name,
            modality=self.modality,
            width=self.width,
            class_position=self.class_position,
            protected=self.protected,
            causal=self.causal,
            segments=tuple(SegmentSpec(s.modality, s.pruned, s.protected) for s in self.segments),
            keeps_last=self.keeps_last,
        )

    def node_names(self) -> tuple[str, ...]:
        """Names of all nodes that the site refers to."""
        readouts = (name.partition("+")[0] for name in self.readouts)
        masks = () if self.mask is None else (self.mask,)
        return (self.attention, self.block_input, self.value, *readouts, *(part.node for part in self.parts), *masks)


@dataclass(frozen=True)
class Refusal:
    """A block that is not pruned.

    Attributes:
        block: Module path.
        node: Name of the node where the rewriter gave up; empty where a whole submodule is refused.
        reason: What stands in the way.
        help: What would help.
        policy: The choice by which the block is left alone although it could be pruned; None if it could not be.
    """

    block: str
    node: str
    reason: str
    help: str
    policy: Policy | None = None

    def report(self) -> RefusalReport:
        """The refusal as users read it."""
        return RefusalReport(self.block, self.node, self.reason, self.help, by_policy=self.policy is not None)


@dataclass(frozen=True)
class Plan:
    """Where a graph is pruned, and what is refused.

    Attributes:
        sites: All sites, in the order of the graph.
        refusals: Blocks that are not pruned, and why.
        alignment_width: Number of channels of the alignment tokens.
        images: Number of images of one sample that go through the vision tower.
        image_order: How these are stacked in the tower's batch: ``"blocked"`` (all first images, then all second ones) or
            ``"interleaved"``.
        version: Version of the JSON form.
    """

    sites: tuple[SitePlan, ...]
    refusals: tuple[Refusal, ...]
    alignment_width: int
    images: int
    image_order: ImageOrder
    version: int = PLAN_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` takes them back."""
        refusals = [{**vars(r), "policy": None if r.policy is None else r.policy.value} for r in self.refusals]
        return {**dataclasses.asdict(self), "refusals": refusals}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Inverse of :meth:`to_dict`.

        Raises:
            PlanError: A field is unknown or missing, or the version is another one.
        """
        if not isinstance(values, Mapping):
            raise PlanError(f"a plan is read from a dict, such as report.plan; this is a {type(values).__name__}.")
        if values.get("version") != PLAN_VERSION:
            raise PlanError(
                f"the plan has version {values.get('version')!r}; this release reads version {PLAN_VERSION}."
            )
        try:
            sites = tuple(_site_from(s) for s in values["sites"])
            refusals = tuple(_refusal_from(r) for r in values["refusals"])
            return cls(
                sites=sites,
                refusals=refusals,
                alignment_width=values["alignment_width"],
                images=values["images"],
                image_order=values["image_order"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"the plan is malformed: {error}. Compare it with Plan.to_dict() of a fresh rewrite."
            ) from error

    def under(self, region: Region) -> Plan:
        """The plan of a region in terms of the whole model: with the names of its blocks there.

        Positions that the rest of the model reads in the region's results are protected.
        """
        sites = tuple(_from_outside(s, region) for s in self.sites)
        refusals = tuple(dataclasses.replace(r, block=region.inside(r.block)) for r in self.refusals)
        return dataclasses.replace(self, sites=sites, refusals=refusals)

    def of(self, region: Region) -> Plan:
        """The part of the plan that lies in a region."""
        return dataclasses.replace(self, sites=tuple(s for s in self.sites if region.holds(s.name)), refusals=())

    def without(self, names: Sequence[str], refusals: Sequence[Refusal] = ()) -> Plan:
        """The plan without the sites of some names, and with refusals in their place if there are any.

        Raises:
            PlanError: ``names`` is one name, not several, or there is no such site.
        """
        if isinstance(names, str):
            raise PlanError(f"names is {names!r}; pass several, such as [{names!r}].")
        known = [site.name for site in self.sites]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1) or known[:1]
                raise PlanError(f"the plan has no site {name!r}; its sites have names such as {near}.")
        kept = tuple(s for s in self.sites if s.name not in names)
        return dataclasses.replace(self, sites=kept, refusals=(*self.refusals, *refusals))


def _site_from(values: Mapping[str, Any]) -> SitePlan:
    segments = tuple(SegmentPlan(s["modality"], s["pruned"], tuple(s["protected"])) for s in values.get("segments", ()))
    parts = tuple(PartPlan(p["node"], p["dim"], p["segment"], tuple(p["special"])) for p in values.get("parts", ()))
    tuples = {name: tuple(values[name]) for name in ("protected", "readouts")}
    return SitePlan(**{**values, **tuples, "segments": segments, "parts": parts})


def _refusal_from(values: Mapping[str, Any]) -> Refusal:
    fields = dict(values)
    by_policy = fields.pop("by_policy", False)  # as plans were written before policies had names
    policy = fields.get("policy", Policy.TOWERS.value if by_policy else None)
    return Refusal(**{**fields, "policy": None if policy is None else Policy(policy)})


def _from_outside(site: SitePlan, region: Region) -> SitePlan:
    first = site.class_position
    if first is None and not site.causal and not site.readouts and region.read_positions:
        first = region.read_positions[0]
    protected = tuple(dict.fromkeys((*site.protected, *region.read_positions)))
    return dataclasses.replace(site, name=region.inside(site.name), protected=protected, class_position=first)


def joined(plans: Sequence[Plan]) -> Plan:
    """The plans of several regions as one."""
    several = next((p for p in plans if p.images > 1), plans[0])
    return Plan(
        sites=tuple(s for p in plans for s in p.sites),
        refusals=tuple(r for p in plans for r in p.refusals),
        alignment_width=max(p.alignment_width for p in plans),
        images=several.images,
        image_order=several.image_order,
    )
