"""Whether pruning a stream can pay for itself: what the guidance of its sites costs against the most that they can save.

Start at :func:`unpaid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from madtp.calls.call import Call
from madtp.config import PruningConfig
from madtp.programs.program import Program
from madtp.sites.additions import PREFIX


class Site(Protocol):
    """What is asked of a site of a plan."""

    @property
    def name(self) -> str: ...
    @property
    def stream(self) -> int: ...
    @property
    def protected(self) -> tuple[int, ...]: ...
    @property
    def readouts(self) -> tuple[str, ...]: ...


def unpaid(
    program: Program, call: Call, sites: Sequence[Site], keys: Mapping[str, str], config: PruningConfig
) -> list[str]:
    """The first site of each stream whose sites cost more on ``call`` than they save with as few tokens as they may keep.

    Args:
        sites: of the program's plan. keys: the names under which the sites stand in the module tree, by name.
    """
    leaves = call.flat()[0]
    whole = sum(program.cost.price(leaves, {}, False).values())
    found = []
    for stream in dict.fromkeys(site.stream for site in sites):
        own = [site for site in sites if site.stream == stream]
        entries = {site.name: program.cost.entries(site.name, leaves) for site in own}
        counts = {site.name: torch.full((entries[site.name],), float(_least(site, config))) for site in own}
        others = {f"{PREFIX}.sites.{keys[site.name]}" for site in sites if site.stream != stream}
        priced = program.cost.price(leaves, counts, True)
        if sum(amount for path, amount in priced.items() if path not in others) >= whole:
            found.append(own[0].name)
    return found


def _least(site: Site, config: PruningConfig) -> int:
    """Tokens that survive at a site in any case, and the merged one."""
    return len(site.protected) + len(site.readouts) + max(1, config.min_tokens) + int(config.merge)
