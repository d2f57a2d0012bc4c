"""A report arranged for a reader: facts, towers layer by layer, and blocks that are not pruned.

Start at :func:`outline_of`. Text and HTML show the same outline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from madtp.report.records import RefusalReport, RewriteReport, Savings, SiteReport

NOT_MEASURED = "not measured yet; madtp.calibrate(pruned, batches, reduction=0.5) sets the strength and measures"
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Fact:
    """A line of the head: what is told, and how much it is."""

    name: str
    value: str


@dataclass(frozen=True)
class Layer:
    """A site in the table of its tower; what was not measured is None.

    Attributes:
        number: of the block in its stream.
        block: name of the site.
        kept: mean number of tokens behind it.
        share: fraction of the tokens that this is.
        cost: milliseconds of a batch that the site takes.
        saving: milliseconds of a batch that it saves.
    """

    number: int
    block: str
    kept: float | None = None
    share: float | None = None
    cost: float | None = None
    saving: float | None = None


@dataclass(frozen=True)
class Tower:
    """The sites of blocks that differ in their number alone.

    Attributes:
        title: modality and paths of the blocks.
        description: what they are, and how many of them are pruned.
        layers: the sites.
    """

    title: str
    description: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Unpruned:
    """Blocks that are not pruned for one reason.

    Attributes:
        blocks: their paths.
        reason: what stands in the way, and at which node.
        help: what would help.
    """

    blocks: tuple[str, ...]
    reason: str
    help: str


@dataclass(frozen=True)
class Outline:
    """A report in the order in which it is read.

    Attributes:
        title: model and what was found, in a sentence.
        facts: what pruning saves and adds.
        towers: where it prunes.
        unpruned: where it does not.
        remarks: kind and text of each.
    """

    title: str
    facts: tuple[Fact, ...]
    towers: tuple[Tower, ...]
    unpruned: tuple[Unpruned, ...]
    remarks: tuple[Fact, ...]


def outline_of(report: RewriteReport) -> Outline:
    """Arrange a report."""
    towers = _towers(report)
    remarks = (
        ("region", report.regions),
        ("images apart", report.per_image_regions),
        ("attention pooling", report.pooling),
        ("note", report.notes),
    )
    return Outline(
        title=(
            f"{report.model} ({report.capture} capture, {report.seconds:.1f} s): {counted(len(report.sites), 'site')} in "
            f"{counted(len(towers), 'tower')}, {counted(len(report.blocks), 'attention block')} in "
            f"{counted(len(report.streams), 'stream')}, {counted(len(report.refusals), 'refusal')}"
        ),
        facts=_facts(report),
        towers=tuple(towers),
        unpruned=_unpruned(report.refusals),
        remarks=tuple(Fact(kind, one or report.model) for kind, several in remarks for one in several),
    )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 site", "2 sites"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def amount(value: float) -> str:
    """Return a number in four digits with a unit: "212.3 M"."""
    for size, unit in _UNITS:
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _facts(report: RewriteReport) -> tuple[Fact, ...]:
    saved = report.savings
    found = [Fact("MACs a sample", NOT_MEASURED if saved is None else _macs(saved))]
    if saved is not None:
        if saved.time_reduction is not None and saved.dense_seconds is not None and saved.seconds is not None:
            times = f"{1000 * saved.dense_seconds:.4g} ms dense, {1000 * saved.seconds:.4g} ms pruned"
            batches = "the batch" if saved.batches == 1 else f"all {saved.batches} batches"
            found.append(Fact("time", f"{times}: {_less(saved.time_reduction, 'less')}, for {batches}"))
        found.append(Fact("strength", f"{saved.setting} {saved.value:.4g}"))
    if report.balances:
        cost, saving = (1000 * sum(getattr(one, side) for one in report.balances) for side in ("cost", "saving"))
        found.append(
            Fact("time of sites", f"{cost:.2f} ms to choose tokens, {saving:.2f} ms saved by that, in the first batch")
        )
    if report.parameters:
        share = report.added_parameters / report.parameters
        found.append(
            Fact(
                "parameters",
                f"{amount(report.parameters)}; pruning adds {amount(report.added_parameters)} ({share:.2%})",
            )
        )
    return tuple(found)


def _macs(saved: Savings) -> str:
    spread = "" if saved.deviation is None else f" (standard error {saved.deviation:.1%})"
    return (
        f"{amount(saved.dense_macs)} dense, {amount(saved.macs)} pruned: {_less(saved.reduction, 'fewer')}{spread}, mean of "
        f"{counted(saved.samples, 'sample')}"
    )


def _less(share: float, word: str) -> str:
    return f"{share:.1%} {word}" if share >= 0 else f"{-share:.1%} more"


def _towers(report: RewriteReport) -> list[Tower]:
    groups: dict[tuple[str, str], list[SiteReport]] = {}
    for site in report.sites:
        groups.setdefault((_pattern(site.name), " + ".join(site.segments) or site.modality), []).append(site)
    kept = {one.site: one for one in (() if report.savings is None else report.savings.tokens)}
    balances = {one.site: one for one in report.balances}
    towers = []
    for (pattern, modality), sites in groups.items():
        layers = []
        for site in sites:
            tokens, balance = kept.get(site.name), balances.get(site.name)
            layers.append(
                Layer(
                    number=site.layer,
                    block=site.name,
                    kept=None if tokens is None else tokens.kept,
                    share=None if tokens is None else tokens.share,
                    cost=None if balance is None else 1000 * balance.cost,
                    saving=None if balance is None else 1000 * balance.saving,
                )
            )
        before = [kept[site.name].before for site in sites if site.name in kept]
        description = _description(report, pattern, sites, before)
        towers.append(Tower(f"{modality}: {pattern}", description, tuple(layers)))
    return towers


def _description(report: RewriteReport, pattern: str, sites: Sequence[SiteReport], before: Sequence[float]) -> str:
    """What the blocks of a tower are, in words; ``before`` holds the tokens in front of its sites where these were measured."""
    paths = {block.path for block in report.blocks if block.kind == "self" and _pattern(block.path) == pattern}
    pruned = {site.name.partition("#")[0] for site in sites}
    of = (
        f"{len(pruned & paths)} of {counted(len(paths), 'block')}" if pruned <= paths else counted(len(pruned), "block")
    )
    counts = [float(f"{n:.1f}") for n in before] or [float(site.tokens) for site in sites]
    protected = dict.fromkeys(site.protected for site in sites if site.protected)
    told = [
        f"{of} pruned",
        " and ".join(dict.fromkeys(f"{site.block_kind}-attention" for site in sites)),
        f"width {_span([site.width for site in sites])}",
        f"{_span(counts)} tokens{'' if before else ' in the example'}",
    ]
    if protected:
        told.append("protected: " + " or ".join(", ".join(map(str, positions)) for positions in protected))
    return ", ".join(told)


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _pattern(path: str) -> str:
    """A path with wildcards in place of numbers between dots: "blocks.*" for "blocks.3"."""
    return re.sub(r"(?<![^.])\d+(?![^.#])", "*", path)


def _unpruned(refusals: Sequence[RefusalReport]) -> tuple[Unpruned, ...]:
    """Refusals with the same words in one place."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for refusal in refusals:
        groups.setdefault((refusal.reason, refusal.help), {}).setdefault(refusal.block, refusal.node)
    found = []
    for (reason, helps), blocks in groups.items():
        nodes = list(dict.fromkeys(node for node in blocks.values() if node))
        at = f" (at {', '.join(nodes)})" if nodes else ""
        found.append(Unpruned(tuple(blocks), reason + at, helps))
    return tuple(found)
