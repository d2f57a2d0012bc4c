"""The report of a rewrite: what was found, where tokens are pruned, which blocks are not and why.

Start at :class:`RewriteReport`; ``str()`` of it is a table.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class SiteReport:
    """A site: a block behind whose attention tokens are pruned.

    Attributes:
        name: Module path of the block; a block that runs twice has a second site, named ``block#2``.
        modality: ``"image"``, ``"text"``, ``"joint"`` or ``"query"``.
        block_kind: Placement of the norm and kind of attention: ``"pre-norm self"`` or ``"post-norm self"``.
        layer: Number of the block in its stream, from 0.
        width: Number of channels C of the stream.
        tokens: Number of tokens N in front of the first site, on the example inputs.
        protected: Constant positions that always survive; negative ones count from the end.
        segments: Modalities that are pruned, each by itself, in a stream that several share.
    """

    name: str
    modality: str
    block_kind: str
    layer: int
    width: int
    tokens: int
    protected: tuple[int, ...]
    segments: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteBalance:
    """What a site costs and saves on one batch, on the device where it was measured.

    Attributes:
        site: Name of the site.
        cost: Seconds to score, select and merge its tokens.
        saving: Seconds that the next blocks would take for the tokens that it drops.
    """

    site: str
    cost: float
    saving: float

    @property
    def worthwhile(self) -> bool:
        """Whether it saves at least what it costs."""
        return self.saving >= self.cost


@dataclass(frozen=True)
class BlockReport:
    """An attention sublayer that was found.

    Attributes:
        path: Module path.
        kind: ``"self"`` or ``"cross"``.
        norm: ``"pre"`` or ``"post"``.
        stream: Index of the stream that its queries come from.
        source: Index of the stream that its keys come from; None if that is not a stream.
    """

    path: str
    kind: str
    norm: str
    stream: int
    source: int | None


@dataclass(frozen=True)
class StreamReport:
    """A residual stream: the chain of residual states of one token sequence.

    Attributes:
        index: Number of the stream in the report.
        modality: ``"image"``, ``"text"``, ``"joint"`` or ``"query"``.
        width: Number of channels C.
        special: Positions of learned tokens, such as the class token and registers.
        readouts: Where its tokens are read, in words.
        segments: Modalities of a stream that several share, in the order of its tokens.
    """

    index: int
    modality: str
    width: int
    special: tuple[int, ...]
    readouts: tuple[str, ...]
    segments: tuple[str, ...] = ()


@dataclass(frozen=True)
class RefusalReport:
    """A block that is not pruned.

    Attributes:
        block: Module path.
        node: Node of the graph; empty where a whole submodule is refused.
        reason: What stands in the way.
        help: What would help.
        by_policy: Whether it could be pruned, but is not unless the configuration asks for it, as the text of a
            language model.
    """

    block: str
    node: str
    reason: str
    help: str
    by_policy: bool = False


@dataclass(frozen=True)
class UnprunedCalls:
    """Calls that run as the original's; ``str()`` is a remark for :attr:`RewriteReport.notes`.

    Attributes:
        called: Path of the module that is called, the name of the model's class, or the name of a method.
        reason: Why no program serves these calls.
    """

    called: str
    reason: str

    def __str__(self) -> str:
        return f"calls of {self.called} that run unpruned: {self.reason}"


@dataclass
class RewriteReport:
    """What :func:`madtp.rewrite` found and did.

    Attributes:
        model: Name of the model's class.
        capture: ``"whole"``, or ``"regions"`` where only some submodules are rewritten.
        sites: Where tokens are pruned.
        refusals: Blocks that are not pruned, and why.
        blocks: All attention sublayers that were found.
        streams: All residual streams that were found.
        network: Streams and blocks as a directed graph: which stream feeds which block, which block which stream.
        seconds: Duration of the rewrite.
        regions: Module paths of the submodules that are rewritten, the first and the last one of blocks that the model calls
            one after the other; empty if the whole model is.
        per_image_regions: Those of ``regions`` whose images are computed one by one.
        pooling: Module paths of attention that condenses tokens into a class token or latents. It reads what is pruned
            and needs no site.
        notes: Remarks, such as on later calls that run unpruned.
        unpruned: The calls that run unpruned, as data; each is a remark in ``notes``, too.
        balances: What each site costs and saves in time; empty until :func:`madtp.calibrate` has measured it.
        plan: The plan that was followed, in JSON types. ``madtp.Plan.from_dict(report.plan)`` makes one to edit, which
            ``madtp.rewrite(model, inputs, plan=...)`` follows.
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
    per_image_regions: tuple[str, ...] = ()
    pooling: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    unpruned: list[UnprunedCalls] = field(default_factory=list)
    balances: list[SiteBalance] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def apart(self) -> tuple[str, ...]:
        """Deprecated name of :attr:`per_image_regions`."""
        return self.per_image_regions

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
            ("images apart", self.per_image_regions),
            ("attention pooling", self.pooling),
            ("note", self.notes),
        )
        for text in (f"{kind}: {one or self.model}" for kind, several in remarks for one in several):
            console.print(text)
        sites = Table(title="sites", title_justify="left")
        for column in ("name", "modality", "block", "layer", "width", "tokens", "protected"):
            sites.add_column(column)
        balances = {balance.site: balance for balance in self.balances}
        if balances:
            cost, saving = (1000 * sum(getattr(one, side) for one in self.balances) for side in ("cost", "saving"))
            console.print(
                f"time of a batch of the calibration, by the clock: all sites cost {cost:.1f} ms and save {saving:.1f} ms"
            )
            sites.add_column("costs", justify="right")
            sites.add_column("saves", justify="right")
        for site in self.sites:
            modality = " + ".join(site.segments) or site.modality
            values = (site.name, modality, site.block_kind, site.layer, site.width, site.tokens)
            balance = balances.get(site.name)
            times = () if balance is None else (f"{1000 * balance.cost:.2f} ms", f"{1000 * balance.saving:.2f} ms")
            sites.add_row(*map(str, values), ", ".join(map(str, site.protected)), *times)
        console.print(sites)
        if self.refusals:
            refusals = Table(title="refusals", title_justify="left")
            for column in ("block", "node", "reason", "what would help"):
                refusals.add_column(column, overflow="fold")
            for refusal in self.refusals:
                refusals.add_row(refusal.block, refusal.node, refusal.reason, refusal.help)
            console.print(refusals)
        return out.getvalue().rstrip()
