"""What each site costs in time and what it saves: :func:`break_even`.

A site costs the time to score, select and merge tokens, and what its block's attention takes longer because it is observed. It
saves the work that the next blocks would do on the tokens that it drops, up to the next site of its stream, which would drop
them anyway. Costs are measured; savings are multiply-accumulates times the dense model's time for one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from madtp.benchmark.timing import median_seconds
from madtp.calls.call import Call
from madtp.programs.program import Run
from madtp.pruned import PrunedModel
from madtp.report import SiteBalance, SiteReport
from madtp.sites.site import PruningSite
from madtp.tuning.search import dense_macs


def break_even(pruned: PrunedModel, call: Call, *, dense_seconds: float | None = None) -> list[SiteBalance]:
    """Return what each site costs and saves on one batch, in the order of the sites.

    Args:
        pruned: in eval mode; it is run a few times without gradients.
        call: the batch.
        dense_seconds: time of the batch without pruning; None measures it.
    """
    with torch.no_grad():
        for _ in range(2):  # once to warm up; a calibration should not wait long
            with timed_sites(pruned) as spent:
                pruned(*call.args, **call.kwargs)
        if dense_seconds is None:
            dense_seconds = median_seconds({"dense": lambda: _dense_call(pruned, call)}, 1)["dense"]
    dense = dense_macs(pruned)
    saved = _saved_macs(pruned) if dense else {}
    return [
        SiteBalance(site=name, cost=spent.of(name), saving=macs / dense * dense_seconds) for name, macs in saved.items()
    ]


def _dense_call(pruned: PrunedModel, call: Call) -> object:
    with pruned.madtp.aside(), pruned.madtp.dense():
        return pruned(*call.args, **call.kwargs)


@dataclass(frozen=True)
class SiteSeconds:
    """Seconds that sites took, by site.

    Attributes:
        observing: what attention took longer because it was observed.
        deciding: scoring, selecting and merging.
    """

    observing: dict[str, float] = field(default_factory=dict)
    deciding: dict[str, float] = field(default_factory=dict)

    def of(self, site: str) -> float:
        """All seconds of a site. To observe saves no time, even if a disturbed measurement says so."""
        return max(0.0, self.observing.get(site, 0.0)) + self.deciding.get(site, 0.0)


@contextmanager
def timed_sites(pruned: PrunedModel) -> Iterator[SiteSeconds]:
    """Time the sites of calls inside the block. Attention runs twice there, observed and not."""
    spent = SiteSeconds()
    handles = []
    for site in pruned.modules():
        if isinstance(site, PruningSite):
            handles += _time_module(site, site.spec.name, spent.deciding, plainly=None)
            for attention in (site.attention, site.packed_attention, site.windows):
                handles += _time_module(attention, site.spec.name, spent.observing, plainly=pruned)
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _time_module(
    module: nn.Module, site: str, spent: dict[str, float], *, plainly: PrunedModel | None
) -> list[torch.utils.hooks.RemovableHandle]:
    """Add the time of a module's calls to ``spent``; if ``plainly``, less what they take with pruning off."""
    begun: list[float] = []

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        begun.append(_now())

    def after(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        taken = _now() - begun.pop()
        if plainly is not None:
            start = _now()
            with plainly.madtp.control.unpruned():
                module.forward(*args, **kwargs)
            taken -= _now() - start
        spent[site] = spent.get(site, 0.0) + taken

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _saved_macs(pruned: PrunedModel) -> dict[str, float]:
    """Multiply-accumulates per sample that each site of the last forward saves, by site."""
    sites = {site.name: site for site in pruned.madtp.report.sites}
    saved: dict[str, float] = {}
    record, guided = pruned.madtp.control.record, pruned.madtp.control.guided
    for run in record.runs:
        counts = {name: state.counts for name, state in run.states.items()}
        own = _price(run, counts, guided=guided)
        for name in counts:
            earlier = _site_before(name, list(counts), sites)
            without = {other: count for other, count in counts.items() if other != name}
            if earlier is not None and counts[earlier].shape == counts[name].shape:
                without[name] = counts[earlier]
            more = _price(run, without, guided=guided) - own
            saved[name] = saved.get(name, 0.0) + more * run.share(record.batch)
    return saved


def _price(run: Run, counts: Mapping[str, torch.Tensor], *, guided: bool) -> float:
    """Multiply-accumulates per sample of a run at other token counts."""
    return sum(run.program.cost.price(run.inputs, counts, active=True, guided=guided).values())


def _site_before(name: str, ran: Sequence[str], sites: Mapping[str, SiteReport]) -> str | None:
    """The site in front of one in its stream."""
    site = sites.get(name)
    before = ran[: list(ran).index(name)]
    for other in reversed(before):
        found = sites.get(other)
        if site is not None and found is not None and found.layer < site.layer and _stream(found) == _stream(site):
            return other
    return None


def _stream(site: SiteReport) -> tuple[str, int, int]:
    return site.modality, site.width, site.tokens
