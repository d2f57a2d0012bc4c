"""Plan: where pruning nodes will stand, as pure data.

Start at :func:`make_plan`. A :class:`Plan` is frozen and goes through JSON unchanged, so it can be stored, edited and
handed back. Later stages decide nothing: what is not in the plan does not happen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from madtp.config import PruningConfig
from madtp.errors import PlanError
from madtp.sites.scoring import Scores, SegmentSpec, SiteSpec
from rewriters.capture.scope import Region
from rewriters.detect.streams import Stream, Structure, Sublayer
from rewriters.graph.nodes import AxisError, example_shape, is_attention, is_tensor, module_path
from rewriters.plan.causality import hides_later_keys
from rewriters.plan.inheritance import inherited
from rewriters.plan.policy import SegmentPlan, is_predicted, left_alone, protected_readouts, segments_of

PLAN_VERSION = 1


@dataclass(frozen=True)
class PartPlan:
    """A part of a concatenation: node and token dimension, number of its segment, positions of learned tokens in it."""

    node: str
    dim: int
    segment: int
    special: tuple[int, ...]


@dataclass(frozen=True)
class SitePlan:
    """One pruning site.

    Attributes:
        name: unique; the module path of the block. modality, stream, layer: where it stands.
        width: C. attention, block_input, value: node names. token_dim, batch_dim: of ``value``.
        norm: "pre" or "post". class_position: of the class token. protected: constant positions (negative: from the
        end).
        readouts: nodes that hold positions the graph reads (``[B]`` or one number), "node+3" for three tokens further on.
        causal: tokens see only earlier ones.
        segments: of a stream that several modalities share. parts: how they were concatenated; or mask: node that is true
        where segment 1 was written into segment 0.
        keeps_last: the last token of each sample that is no padding is protected: a language model goes on from it.
        scores: what the block's attention tells of its tokens: "attention" (all), "windows" (within windows of the grid),
        "none" (its keys are no tokens).
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


@dataclass(frozen=True)
class Refusal:
    """A block that is left alone: where, why, and what would help. by_policy: it could be pruned, but should not be unasked."""

    block: str
    node: str
    reason: str
    help: str
    by_policy: bool = False


@dataclass(frozen=True)
class Plan:
    """All sites of a graph, the width of the alignment tokens, and what is refused.

    ``images`` of one sample go through the vision tower; ``image_order`` says how they are stacked in its batch:
    "blocked" (all first images, then all second ones) or "interleaved".
    """

    sites: tuple[SitePlan, ...]
    refusals: tuple[Refusal, ...]
    alignment_width: int
    images: int
    image_order: str
    version: int = PLAN_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Inverse of :meth:`to_dict`; raises :class:`PlanError` on unknown or missing fields."""
        if values.get("version") != PLAN_VERSION:
            raise PlanError(
                f"the plan has version {values.get('version')!r}; this release reads version {PLAN_VERSION}."
            )
        try:
            sites = tuple(_site_from(s) for s in values["sites"])
            refusals = tuple(Refusal(**r) for r in values["refusals"])
            return cls(sites, refusals, values["alignment_width"], values["images"], values["image_order"])
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"the plan is malformed: {error}. Compare it with Plan.to_dict() of a fresh rewrite."
            ) from error

    def under(self, region: Region) -> Plan:
        """The plan of a region with the names that its blocks have in the whole model; what that reads is protected."""
        sites = tuple(_from_outside(s, region) for s in self.sites)
        refusals = tuple(dataclasses.replace(r, block=region.inside(r.block)) for r in self.refusals)
        return dataclasses.replace(self, sites=sites, refusals=refusals)

    def of(self, region: Region) -> Plan:
        """The part of the plan that lies in a region."""
        return dataclasses.replace(self, sites=tuple(s for s in self.sites if region.holds(s.name)), refusals=())

    def without(self, names: Sequence[str], refusals: Sequence[Refusal]) -> Plan:
        """The plan with some sites turned into refusals."""
        kept = tuple(s for s in self.sites if s.name not in names)
        return dataclasses.replace(self, sites=kept, refusals=(*self.refusals, *refusals))


def _site_from(values: Mapping[str, Any]) -> SitePlan:
    segments = tuple(SegmentPlan(s["modality"], s["pruned"], tuple(s["protected"])) for s in values.get("segments", ()))
    parts = tuple(PartPlan(p["node"], p["dim"], p["segment"], tuple(p["special"])) for p in values.get("parts", ()))
    tuples = {name: tuple(values[name]) for name in ("protected", "readouts")}
    return SitePlan(**{**values, **tuples, "segments": segments, "parts": parts})


def _from_outside(site: SitePlan, region: Region) -> SitePlan:
    first = site.class_position
    if first is None and not site.causal and not site.readouts and region.read:
        first = region.read[0]
    protected = tuple(dict.fromkeys((*site.protected, *region.read)))
    return dataclasses.replace(site, name=region.inside(site.name), protected=protected, class_position=first)


def joined(plans: Sequence[Plan]) -> Plan:
    """The plans of several regions as one."""
    several = next((p for p in plans if p.images > 1), plans[0])
    return Plan(
        tuple(s for p in plans for s in p.sites),
        tuple(r for p in plans for r in p.refusals),
        max(p.alignment_width for p in plans),
        several.images,
        several.image_order,
    )


def make_plan(structure: Structure, config: PruningConfig, inputs: Sequence[Any], module: torch.nn.Module) -> Plan:
    """Decide on sites for every self-attention sublayer of every stream that ``config`` wants pruned.

    Args:
        structure: from :func:`rewriters.detect.streams.detect`.
        inputs: flattened example inputs of the capture, to tell causal masks.
        module: resolves the graph's parameters.
    """
    sites: list[SitePlan] = []
    refusals = [_unplaced(node, reason) for node, reason in structure.unplaced]
    names: dict[str, int] = {}
    inheritance = inherited(structure, config)
    for stream in structure.streams:
        wanted = inheritance[stream.index]
        segments = segments_of(stream, structure.graph, config, inputs, module)
        left = left_alone(stream, segments, structure.graph, config, inputs, module)
        chosen = left is not None
        try:
            protected, readouts = protected_readouts(stream, config)
        except AxisError as error:
            left = left or (str(error), "a readout at a position that depends on one length only")
        if wanted.unknown is not None:
            left = left or (wanted.unknown, "a readout at a position that can be told in the stream it comes from")
        if left is not None:
            blocks = (s for s in stream.sublayers if s.kind == "self")
            refusals.extend(Refusal(s.path, s.attention.name, *left, by_policy=chosen) for s in blocks)
            continue
        predicted = is_predicted(stream, segments, structure.graph, inputs, module)
        protected = tuple(dict.fromkeys((*protected, *wanted.positions)))
        readouts = tuple(dict.fromkeys((*readouts, *wanted.readouts)))
        for layer, sublayer in enumerate(s for s in stream.sublayers if s.kind == "self"):
            if any(site.value == sublayer.value.name for site in sites):
                continue  # It runs in parallel with another one, whose site prunes for both.
            reason = _unfit(sublayer)
            if reason is not None:
                refusals.append(reason)
                continue
            seen = sublayer.scores == "attention"
            causal = seen and hides_later_keys(structure.graph, sublayer.attention, inputs, module)
            site = _site(stream, sublayer, layer, protected, readouts, causal, segments, names)
            sites.append(dataclasses.replace(site, keeps_last=predicted, scores=sublayer.scores))
    width = config.alignment_width or max((s.width for s in sites), default=1)
    images = max((s.parts for s in structure.streams if s.modality == "image"), default=1)
    return Plan(tuple(sites), tuple(refusals), width, images, "blocked" if images > 1 else "interleaved")


def _site(
    stream: Stream,
    sublayer: Sublayer,
    layer: int,
    protected: tuple[int, ...],
    readouts: tuple[str, ...],
    causal: bool,
    segments: tuple[SegmentPlan, ...],
    names: dict[str, int],
) -> SitePlan:
    name = sublayer.path
    names[name] = names.get(name, 0) + 1
    if names[name] > 1:
        name = f"{name}#{names[name]}"
    class_position: int | None = None
    if not causal:
        class_position = stream.special[0] if stream.special else (protected[0] if protected else None)
    elif protected and protected[0] < 0:
        class_position = protected[0]
    return SitePlan(
        name,
        stream.modality,
        stream.index,
        layer,
        stream.width,
        sublayer.attention.name,
        sublayer.block_input.name,
        sublayer.value.name,
        sublayer.token_dim,
        sublayer.batch_dim,
        sublayer.norm,
        class_position,
        protected,
        readouts,
        causal,
        segments,
        *_layout(stream, segments),
    )


def _layout(stream: Stream, segments: tuple[SegmentPlan, ...]) -> tuple[tuple[PartPlan, ...], str | None]:
    if not segments or stream.layout is None:
        return (), None
    mask = stream.layout.mask
    parts = tuple(PartPlan(p.node.name, p.dim, p.segment, p.special) for p in stream.layout.parts)
    return parts, None if mask is None else mask.name


def _unfit(sublayer: Sublayer) -> Refusal | None:
    if not sublayer.value.users:
        return Refusal(
            sublayer.path, sublayer.value.name, "its output is never read", "nothing: the block is dead code"
        )
    if not all(is_tensor(n) for n in (sublayer.value, sublayer.block_input)):
        return Refusal(
            sublayer.path, sublayer.value.name, "its residual stream is not a tensor", "a different block structure"
        )
    if example_shape(sublayer.value)[sublayer.token_dim] < 3:
        return Refusal(
            sublayer.path, sublayer.value.name, "it has fewer than 3 tokens", "example inputs with more tokens"
        )
    return None


def _unplaced(node: fx.Node, reason: str) -> Refusal:
    if is_attention(node):
        help = "attention on a residual stream x + f(x) of shape [B, N, C]"
    else:
        help = "scaled_dot_product_attention, or a product, scale, mask, softmax and product over heads [B, H, N, D]"
    return Refusal(module_path(node) or node.name, node.name, reason, help)


def _spec(site: SitePlan) -> SiteSpec:
    segments = tuple(SegmentSpec(s.modality, s.pruned, s.protected) for s in site.segments)
    return SiteSpec(
        name=site.name,
        modality=site.modality,
        width=site.width,
        class_position=site.class_position,
        protected=site.protected,
        causal=site.causal,
        segments=segments,
        keeps_last=site.keeps_last,
    )
