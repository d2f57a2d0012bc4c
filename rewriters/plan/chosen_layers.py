"""The layers that the configuration chooses (``PruningConfig.layers``): :func:`in_chosen_layers`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from madtp.config import PruningConfig
from rewriters.plan.plan import Plan, Refusal, SitePlan
from rewriters.plan.policy import LAYERS

NOT_FOUND = (
    "config.layers names {} of {!r}, but no block of that number, whose path fits, can be pruned; `print(pruned.madtp.report)` "
    "lists the blocks and their layers"
)


def block_of(site: SitePlan) -> str:
    """The path of the block of a site."""
    return site.name.partition("#")[0]


def in_chosen_layers(plan: Plan, config: PruningConfig) -> Plan:
    """The plan without the sites in blocks that the configuration leaves out. Names are those in the whole model."""
    out = [site for site in plan.sites if not config.prunes_layer(block_of(site), site.layer)]
    refusals = [Refusal(block_of(s), s.attention, LAYERS.reason, LAYERS.help, LAYERS.policy) for s in out]
    return plan.without([site.name for site in out], refusals)


def layers_not_found(config: PruningConfig, sites: Iterable[SitePlan]) -> Iterator[str]:
    """What to say of numbers in ``layers`` that belong to no site."""
    planned = list(sites)
    for pattern, numbers in config.chosen_layers():
        found = {site.layer for site in planned if fnmatchcase(block_of(site), pattern)}
        missing = [number for number in numbers if number not in found]
        if missing:
            yield NOT_FOUND.format(", ".join(map(str, missing)), pattern)
