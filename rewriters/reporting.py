"""What was found, for people."""

from __future__ import annotations

from typing import Any

import networkx as nx
from torch import nn

from madtp.report import BlockReport, RefusalReport, RewriteReport, SiteReport, StreamReport
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
    RestReadout,
)
from rewriters.graph.nodes import example_shape, module_path
from rewriters.regions import Part, Parts

PREDICTED = (
    "a language model read at every position: the last token of each sample is kept, predictions at dropped positions come "
    "from the last state these had; PruningConfig(towers=('image',)) leaves text alone"
)


def _report(model: nn.Module, found: Parts) -> RewriteReport:
    whole = RewriteReport(type(model).__name__, "whole" if found.whole else "regions", [], [], [], [])
    whole.network = nx.DiGraph()
    whole.refusals.extend(RefusalReport(r.block, r.node, r.reason, r.help, r.by_policy) for r in found.plan.refusals)
    if not found.whole:
        whole.regions = tuple(part.region.path for part in found.parts)
        whole.apart = tuple(part.region.path for part in found.parts if part.region.apart is not None)
    for part in found.parts:
        _report_part(whole, part)
    if any(site.keeps_last for site in found.plan.sites):
        whole.notes.append(PREDICTED)
    return whole


def _report_part(report: RewriteReport, part: Part) -> None:
    """Add a part to the report; its streams are numbered after those of the parts before it."""

    structure, region = part.rewritten.structure, part.region
    first = len(report.streams)
    tokens = {s.attention.name: s for s in structure.sublayers}
    for s in part.rewritten.plan.sites:
        kind = f"{s.norm}-norm self"
        count = _tokens(tokens[s.attention])
        segments = tuple(p.modality for p in s.segments if p.pruned)
        report.sites.append(SiteReport(s.name, s.modality, kind, s.layer, s.width, count, s.protected, segments))
    for block in structure.sublayers:
        source = None if block.source is None else first + block.source
        path = region.inside(block.path)
        report.blocks.append(BlockReport(path, block.kind, block.norm, first + block.stream, source))
    report.pooling += tuple(region.inside(module_path(node) or node.name) for node in structure.pooling)
    for stream in structure.streams:
        readouts = tuple(
            dict.fromkeys(_words(r) for r in stream.flow.readouts.values() if not isinstance(r, LengthReadout))
        )
        segments = () if stream.layout is None else stream.layout.segments
        report.streams.append(
            StreamReport(first + stream.index, stream.modality, stream.width, stream.special, readouts, segments)
        )
    report.network = nx.compose(report.network, structure.network(region.inside, first))


def _tokens(sublayer: Any) -> int:

    return example_shape(sublayer.value)[sublayer.token_dim]


def _words(readout: Readout) -> str:
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
