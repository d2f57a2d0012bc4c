"""The report of a rewrite, for people.

Start at :func:`report_of`.
"""

from __future__ import annotations

import networkx as nx
from torch import nn

from madtp.calls.texts import holds_texts
from madtp.report import BlockReport, RewriteReport, SiteReport, StreamReport
from rewriters.axes.readouts import (
    BatchReadout,
    ConcatenationReadout,
    IndexReadout,
    LengthReadout,
    MaskedMeanReadout,
    PoolingReadout,
    PositionReadout,
    PrefixReadout,
    RangeReadout,
    RangesReadout,
    Readout,
    RejoinedReadout,
    RestReadout,
)
from rewriters.detect.structure import Sublayer
from rewriters.graph.nodes import example_shape, module_path
from rewriters.pipeline import RewrittenRegion
from rewriters.regions.rewritten import RewrittenRegions

KEEPS_LAST = (
    "a language model read at every position: the last token of each sample is kept, predictions at dropped positions come "
    "from the last state these had; PruningConfig(towers=('image',)) leaves text alone"
)

TEXTS = (
    "the call holds texts that the model tokenises itself, which are constants of its program: a call with other texts makes "
    "one more. Let a submodule run the transformer, or pass token ids"
)
PADDED = "{} runs on a padded batch in part, which costs time: {}"


def report_of(model: nn.Module, rewritten: RewrittenRegions) -> RewriteReport:
    """What was found in a model and done to it."""
    plan = rewritten.plan
    report = RewriteReport(
        model=type(model).__name__,
        capture="whole" if rewritten.whole else "regions",
        sites=[],
        refusals=[refusal.report() for refusal in plan.refusals],
        blocks=[],
        streams=[],
        network=nx.DiGraph(),
        plan=plan.to_dict(),
    )
    if not rewritten.whole:
        report.regions = tuple(r.region.name for r in rewritten.regions)
        report.per_image_regions = tuple(r.region.path for r in rewritten.regions if r.region.per_image is not None)
    for region in rewritten.regions:
        add_region(report, region)
        report.notes += [PADDED.format(region.region.name or report.model, why) for why in region.program.padded]
    if rewritten.whole and holds_texts(rewritten.regions[0].call):
        report.notes.append(TEXTS)
    if any(site.keeps_last for site in plan.sites):
        report.notes.append(KEEPS_LAST)
    return report


def add_region(report: RewriteReport, rewritten: RewrittenRegion) -> None:
    """Add a region to the report; its streams are numbered after those of the regions before it."""
    structure, region = rewritten.structure, rewritten.region
    first = len(report.streams)
    sublayers = {s.attention.name: s for s in structure.sublayers}
    for site in rewritten.plan.sites:
        report.sites.append(
            SiteReport(
                name=site.name,
                modality=site.modality,
                block_kind=f"{site.norm}-norm self",
                layer=site.layer,
                width=site.width,
                tokens=token_count(sublayers[site.attention]),
                protected=site.protected,
                segments=tuple(s.modality for s in site.segments if s.pruned),
            )
        )
    for block in structure.sublayers:
        report.blocks.append(
            BlockReport(
                path=region.inside(block.path),
                kind=block.kind,
                norm=block.norm,
                stream=first + block.stream,
                source=None if block.source is None else first + block.source,
            )
        )
    report.pooling += tuple(region.inside(module_path(node) or node.name) for node in structure.pooling)
    for stream in structure.streams:
        readouts = [r for r in stream.flow.readouts.values() if not isinstance(r, LengthReadout)]
        report.streams.append(
            StreamReport(
                index=first + stream.index,
                modality=stream.modality,
                width=stream.width,
                special=stream.special,
                readouts=tuple(dict.fromkeys(map(describe, readouts))),
                segments=() if stream.layout is None else stream.layout.segments,
            )
        )
    report.network = nx.compose(report.network, structure.network(region.inside, first))


def token_count(sublayer: Sublayer) -> int:
    """Tokens in a sublayer's stream on the example inputs."""
    return example_shape(sublayer.value)[sublayer.token_dim]


def describe(readout: Readout) -> str:
    """Which tokens a readout reads, in words."""
    match readout:
        case PositionReadout(position=position):
            return f"token {position}"
        case PrefixReadout(length=length):
            return f"the first {length} tokens"
        case RestReadout(start=start):
            return f"all tokens from {start} on"
        case RangeReadout():
            return "a range of tokens"
        case RangesReadout():
            return "consecutive ranges of tokens"
        case RejoinedReadout():
            return "consecutive ranges of tokens, put together again"
        case ConcatenationReadout():
            return "concatenation with other tokens"
        case IndexReadout():
            return "one token at a computed position"
        case PoolingReadout():
            return "pooling over tokens"
        case MaskedMeanReadout():
            return "masked mean over tokens"
        case BatchReadout():
            return "parts of the batch"
    raise TypeError(f"{readout} has no words")
