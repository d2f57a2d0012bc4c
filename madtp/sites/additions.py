"""What pruning adds to a model, all under one prefix; start at :class:`Additions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from madtp.calls.hooks import OwnHooks
from madtp.cost.table import CostTable
from madtp.method.guidance import AlignmentTokens
from madtp.sites.control import PruningControl
from madtp.sites.site import PruningSite
from madtp.sites.spec import SiteSpec

PREFIX = "madtp"


class Additions(nn.Module):
    """All that pruning adds to a model: alignment tokens, sites, and constants of the captured graphs.

    Args:
        specs: the specs of the sites.
        keys: names of the sites as modules, in the order of ``specs``.
        control: shared by the sites.
        alignment_width: d_e, the width of the alignment tokens.

    Attributes:
        control: shared by the sites.
        programs: number of programs made so far.
        alignment_width: d_e.
        widths: widths of the pruned streams.
        alignment: the alignment tokens E; absent without alignment.
        sites: the sites by name.
        constants: holds the tensors of captured graphs as buffers.
        own_hooks: the hooks that are part of the host.
        own_forward: the host's forward, where it is an attribute of the host and not a method of its class.
    """

    def __init__(self, specs: list[SiteSpec], keys: list[str], control: PruningControl, alignment_width: int) -> None:
        super().__init__()
        config = control.config
        self.control = control
        self.own_hooks = OwnHooks()
        self.own_forward: Callable[..., Any] | None = None
        self.programs = 0
        self.alignment_width = alignment_width
        self.widths = {spec.width for spec in specs}
        if config.alignment:
            self.alignment = AlignmentTokens(config.alignment_tokens, alignment_width, seed=config.seed)
            control.alignment = self.alignment
        self.sites = nn.ModuleDict(
            {
                key: PruningSite(spec, control, alignment_width, config.seed + 1 + number)
                for number, (key, spec) in enumerate(zip(keys, specs, strict=True))
            }
        )
        self.constants = nn.Module()

    def bind(self, cost: CostTable) -> None:
        """Give values to those sizes of a cost table that depend on the whole model."""
        config = self.control.config
        cost.bind("alignment_tokens", config.alignment_tokens if config.alignment else 0)
        cost.bind("alignment_width", self.alignment_width)
        for width in self.widths:
            projected = config.alignment and (config.query_projection == "always" or width != self.alignment_width)
            cost.bind(f"projection of {width}", width * self.alignment_width if projected else 0)


def additions_of(host: nn.Module) -> Additions:
    """What pruning has added to the module tree ``host``."""
    additions = host._modules[PREFIX]
    assert isinstance(additions, Additions)
    return additions
