"""Decide on the sites of a graph.

Start at :func:`make_plan`. Each stream is decided on as a whole, then its blocks get a site each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from madtp.config import PruningConfig
from rewriters.detect.structure import Stream, Structure, Sublayer
from rewriters.graph.nodes import AxisError, example_shape, is_tensor, module_path
from rewriters.plan.causality import Example, hides_later_keys
from rewriters.plan.inheritance import Inheritance, inherited
from rewriters.plan.plan import PartPlan, Plan, Refusal, SitePlan
from rewriters.plan.policy import SegmentPlan, is_predicted, left_alone, protected_readouts, segments_of


def make_plan(structure: Structure, config: PruningConfig, inputs: Sequence[Any], module: nn.Module) -> Plan:
    """Decide on a site for every self-attention sublayer of every stream that ``config`` wants pruned.

    Args:
        structure: From :func:`rewriters.detect.streams.detect`.
        config: How to prune.
        inputs: Flattened example inputs of the capture, to tell causal masks.
        module: Resolves the graph's parameters.
    """
    example = Example(structure.graph, inputs, module)
    sites: list[SitePlan] = []
    unplaced = [
        Refusal(module_path(u.attention) or u.attention.name, u.node.name, u.reason, u.help) for u in structure.unplaced
    ]
    # A block may call its attention for each window.
    refusals = list({(refusal.block, refusal.reason): refusal for refusal in reversed(unplaced)}.values())[::-1]
    inherited_by = inherited(structure, config)
    for stream in structure.streams:
        decision = _decide(stream, config, example, inherited_by[stream.index])
        sublayers = [s for s in stream.sublayers if s.kind == "self"]
        if not isinstance(decision, StreamPlan):
            refusals.extend(dataclasses.replace(decision, block=s.path, node=s.attention.name) for s in sublayers)
            continue
        for layer, sublayer in enumerate(sublayers):
            if any(site.value == sublayer.value.name for site in sites):
                continue  # It runs in parallel with another one, whose site prunes for both.
            reason = _unfit(sublayer)
            if reason is not None:
                refusals.append(reason)
                continue
            name = _unique_name(sublayer.path, sites)
            sites.append(_site(name, decision, sublayer, layer, example))
    images = max((s.parts for s in structure.streams if s.modality == "image"), default=1)
    return Plan(
        sites=tuple(sites),
        refusals=tuple(refusals),
        alignment_width=config.alignment_width or max((s.width for s in sites), default=1),
        images=images,
        image_order="blocked" if images > 1 else "interleaved",
    )


@dataclass(frozen=True)
class StreamPlan:
    """What all sites of a stream have in common; the fields are those of :class:`SitePlan`."""

    stream: Stream
    protected: tuple[int, ...]
    readouts: tuple[str, ...]
    segments: tuple[SegmentPlan, ...]
    keeps_last: bool


def _decide(stream: Stream, config: PruningConfig, example: Example, inheritance: Inheritance) -> StreamPlan | Refusal:
    """How a stream is pruned, or a refusal, without block and node, for each of its blocks."""
    segments = segments_of(stream, config, example)
    refused = left_alone(stream, segments, config, example)
    if refused is not None:
        return Refusal("", "", refused.reason, refused.help, refused.policy)
    try:
        own = protected_readouts(stream, config)
    except AxisError as error:
        return Refusal("", "", str(error), "a readout at a position that depends on one length only")
    if inheritance.unknown is not None:
        help = "a readout at a position that can be told in the stream it comes from"
        return Refusal("", "", inheritance.unknown, help)
    return StreamPlan(
        stream=stream,
        protected=tuple(dict.fromkeys((*own.positions, *inheritance.positions))),
        readouts=tuple(dict.fromkeys((*own.readouts, *inheritance.readouts))),
        segments=segments,
        keeps_last=is_predicted(stream, segments, example),
    )


def _unique_name(block: str, sites: Sequence[SitePlan]) -> str:
    """The name of a further site in ``block``: a block that runs again has one for each time."""
    runs = 1 + sum(site.name.partition("#")[0] == block for site in sites)
    return block if runs == 1 else f"{block}#{runs}"


def _site(name: str, decision: StreamPlan, sublayer: Sublayer, layer: int, example: Example) -> SitePlan:
    stream, protected, layout = decision.stream, decision.protected, decision.stream.layout
    causal = sublayer.scores == "attention" and hides_later_keys(example, sublayer.attention)
    class_position: int | None = None
    if not causal:
        class_position = stream.special[0] if stream.special else (protected[0] if protected else None)
    elif protected and protected[0] < 0:
        class_position = protected[0]
    shared = layout if decision.segments else None
    return SitePlan(
        name=name,
        modality=stream.modality,
        stream=stream.index,
        layer=layer,
        width=stream.width,
        attention=sublayer.attention.name,
        block_input=sublayer.block_input.name,
        value=sublayer.value.name,
        token_dim=sublayer.token_dim,
        batch_dim=sublayer.batch_dim,
        norm=sublayer.norm,
        class_position=class_position,
        protected=protected,
        readouts=decision.readouts,
        causal=causal,
        segments=decision.segments,
        parts=() if shared is None else tuple(PartPlan(p.node.name, p.dim, p.segment, p.special) for p in shared.parts),
        mask=None if shared is None or shared.mask is None else shared.mask.name,
        keeps_last=decision.keeps_last,
        scores=sublayer.scores,
    )


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
