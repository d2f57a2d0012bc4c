"""Payoff: whether pruning a stream pays for the guidance of its sites.

Start at :func:`sites_without_payoff`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from madtp.calls.call import Call
from madtp.config import PruningConfig
from madtp.programs.program import Program
from madtp.sites.additions import PREFIX
from rewriters.insert.workspace import site_key
from rewriters.plan.plan import SitePlan


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
    dense = sum(program.cost.price(leaves, {}, False).values())
    names = []
    for stream in dict.fromkeys(site.stream for site in sites):
        own = [site for site in sites if site.stream == stream]
        counts = {
            site.name: torch.full((program.cost.entries(site.name, leaves),), float(_fewest_tokens(site, config)))
            for site in own
        }
        others = {f"{PREFIX}.sites.{site_key(site.name)}" for site in sites if site.stream != stream}
        priced = program.cost.price(leaves, counts, True)
        if sum(amount for path, amount in priced.items() if path not in others) >= dense:
            names.append(own[0].name)
    return names


def _fewest_tokens(site: SitePlan, config: PruningConfig) -> int:
    """Tokens that survive at a site in any case, with the merged one."""
    return len(site.protected) + len(site.readouts) + max(1, config.min_tokens) + int(config.merge)
