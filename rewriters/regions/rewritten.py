"""What a rewrite of a model makes: :class:`RewrittenRegions`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rewriters.capture.scope import WHOLE
from rewriters.pipeline import RewrittenRegion
from rewriters.plan.plan import Plan, Refusal, joined


def site_count(regions: Iterable[RewrittenRegion]) -> int:
    """The number of sites of several regions."""
    return sum(len(region.plan.sites) for region in regions)


@dataclass
class RewrittenRegions:
    """All rewritten regions of a model: the model itself, or submodules of it.

    A model whose images are computed one by one is a region like others, at the path of the whole.

    Attributes:
        regions: The rewritten regions.
        refusals: Refusals of submodules that are not rewritten.
    """

    regions: list[RewrittenRegion]
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the one region is the model itself, as it is called."""
        return [r.region for r in self.regions] == [WHOLE]

    @property
    def plan(self) -> Plan:
        """The plans of all regions as one."""
        return joined([r.plan for r in self.regions]).without((), self.refusals)
