"""Payoff: whether pruning saves anything, and whether what it saves pays for the guidance of its sites.

Start at :func:`saving_of` and :func:`sites_without_payoff`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from madtp.calls.call import Call
from madtp.config import PruningConfig
from madtp.errors import RewriteError
from madtp.method.parts import parts_of
from madtp.programs.program import Program
from madtp.sites.additions import PREFIX
from rewriters.insert.workspace import site_key
from rewriters.plan.plan import SitePlan

# Sums of prices differ by rounding.
ROUNDING = 1e-9


def sites_without_payoff(program: Program, call: Call, sites: Sequence[SitePlan], config: PruningConfig) -> list[str]:
    """The first site of each stream whose sites cost more on ``call`` than they save at best.

    At best, each site keeps as few tokens as it may.

    Args:
        program: The program that prunes at ``sites``.
        call: The call to price, opened.
        sites: All sites of the program's plan.
        config: How to prune.
    """
    leaves = call.flat()[0]
    dense = program.dense_macs(leaves)
    names = []
    for stream in dict.fromkeys(site.stream for site in sites):
        own = [site for site in sites if site.stream == stream]
        counts = {
            site.name: torch.full((program.cost.entries(site.name, leaves),), float(_fewest_tokens(site, config)))
            for site in own
        }
        others = {f"{PREFIX}.sites.{site_key(site.name)}" for site in sites if site.stream != stream}
        priced = program.cost.price(leaves, counts, True, guided=parts_of(config).needs.guidance)
        if sum(amount for path, amount in priced.items() if path not in others) >= dense:
            names.append(own[0].name)
    return names


@dataclass(frozen=True)
class Saving:
    """What a program costs in multiply-accumulates per sample; guidance does not count.

    Attributes:
        sites: its sites.
        dense: without pruning.
        least: where its sites keep no token at all; as much as ``dense`` if all that follows them runs on all tokens.
        most: where its sites keep every token; more than ``dense`` if something runs on all tokens and on kept ones as well.
    """

    sites: tuple[str, ...]
    dense: float
    least: float
    most: float

    @property
    def is_missing(self) -> bool:
        """Whether nothing is saved however much is pruned."""
        return bool(self.sites) and self.least >= self.dense * (1 - ROUNDING)

    def __str__(self) -> str:
        return (
            f"pruning at {', '.join(self.sites)} saves nothing: if all tokens are dropped there, a sample still takes "
            f"{self.least:,.0f} MACs, where it takes {self.dense:,.0f} without pruning, for what follows needs every position"
        )


def saving_of(program: Program, call: Call) -> Saving:
    """What ``program`` saves on ``call``, which is opened.

    Raises:
        RewriteError: It saves nothing, and costs more than without pruning.
    """
    leaves = call.flat()[0]
    none = {site: torch.zeros(program.cost.entries(site, leaves)) for site in program.cost.streams}
    dense = program.dense_macs(leaves)
    least, most = (
        sum(
            amount
            for path, amount in program.cost.price(leaves, counts, True).items()
            if not path.startswith(f"{PREFIX}.sites.")
        )
        for counts in (none, {})
    )
    found = Saving(tuple(none), dense, least, most)
    if found.is_missing and most > dense * (1 + ROUNDING):
        raise RewriteError(f"{found}, and some of it runs on kept tokens as well: up to {most:,.0f} MACs.")
    return found


def why_nothing_is_saved(program: Program, call: Call) -> str | None:
    """Why pruning saves nothing on ``call``, which is opened, however strong it is; None if it saves something."""
    try:
        found = saving_of(program, call)
    except RewriteError as error:
        return str(error)
    return str(found) if found.is_missing else None


def _fewest_tokens(site: SitePlan, config: PruningConfig) -> int:
    """Tokens that survive at a site in any case, with the merged one."""
    return len(site.protected) + len(site.readouts) + max(1, config.min_tokens) + int(config.merges)
