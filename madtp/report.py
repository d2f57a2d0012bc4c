"""The report of a rewrite: what was found, where tokens are pruned, what is left alone and why.

Start at :class:`RewriteReport`; ``str()`` of it is a table.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class SiteReport:
    """A pruning site. block_kind: norm placement and attention ("pre-norm self", "post-norm self"). tokens: in the
    example. segments: modalities that are pruned, each by itself, in a stream that several share."""

    name: str
    modality: str
    block_kind: str
    layer: int
    width: int
    tokens: int
    protected: tuple[int, ...]
    segments: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockReport:
    """An attention sublayer that was found. kind: "self" or "cross". stream, source: streams of queries and keys."""

    path: str
    kind: str
    norm: str
    stream: int
    source: int | None


@dataclass(frozen=True)
class StreamReport:
    """A residual stream. readouts: where its tokens are read, in words. segments: modalities of a stream that several
    share, in the order of its tokens."""

    index: int
    modality: str
    width: int
    special: tuple[int, ...]
    readouts: tuple[str, ...]
    segments: tuple[str, ...] = ()


@dataclass(frozen=True)
class RefusalReport:
    """A block that is left alone: module path, graph node, reason, and what would help. by_policy: it could be pruned, but
    should not be unasked, as the text of a language model."""

    block: str
    node: str
    reason: str
    help: str
    by_policy: bool = False


@dataclass
class RewriteReport:
    """What :func:`madtp.rewrite` found and did.

    pooling: module paths of attention that condenses tokens (into a class token or latents): it reads what is pruned and needs
    no site. capture: "whole", or "regions" where only the submodules named in ``regions`` are rewritten. network: streams and
    blocks as a networkx DiGraph. apart: the regions whose calls are taken apart into images. notes: remarks, such as on later
    calls that run unpruned.
    """

    model: str
    capture: str
    sites: list[SiteReport]
    refusals: list[RefusalReport]
    blocks: list[BlockReport]
    streams: list[StreamReport]
    network: networkx.DiGraph | None = None
    seconds: float = 0.0
    regions: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    pooling: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        out = io.StringIO()
        console = Console(file=out, width=140, no_color=True, highlight=False)
        console.print(
            f"{self.model}: {len(self.streams)} streams, {len(self.blocks)} attention sublayers, {len(self.sites)} sites, "
            f"{len(self.refusals)} refusals ({self.capture} capture, {self.seconds:.1f} s)"
        )
        remarks = (
            ("region", self.regions),
            ("images apart", self.apart),
            ("attention pooling", self.pooling),
            ("note", self.notes),
        )
        for text in (f"{kind}: {one or self.model}" for kind, several in remarks for one in several):
            console.print(text)
        sites = Table(title="sites", title_justify="left")
        for column in ("name", "modality", "block", "layer", "width", "tokens", "protected"):
            sites.add_column(column)
        for site in self.sites:
            modality = " + ".join(site.segments) or site.modality
            values = (site.name, modality, site.block_kind, site.layer, site.width, site.tokens)
            sites.add_row(*map(str, values), ", ".join(map(str, site.protected)))
        console.print(sites)
        if self.refusals:
            refusals = Table(title="refusals", title_justify="left")
            for column in ("block", "node", "reason", "what would help"):
                refusals.add_column(column, overflow="fold")
            for refusal in self.refusals:
                refusals.add_row(refusal.block, refusal.node, refusal.reason, refusal.help)
            console.print(refusals)
        return out.getvalue().rstrip()
