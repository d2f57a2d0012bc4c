"""Where a language model begins without the image tokens that its vision tower has dropped: :class:`StreamStart`."""

from __future__ import annotations

from torch import Tensor, nn

from madtp.calls.compiling import is_compiling
from madtp.method.arrays import on_host
from madtp.sites.control import PruningControl
from madtp.sites.spec import SiteSpec
from madtp.tokens.assembly import Decision, assemble
from madtp.tokens.state import TokenState, hide_dropped, unpruned_state

SUFFIX = "@start"
"""Behind the name of a site: the name of the state of the tokens at the start of its block."""


class StreamStart(nn.Module):
    """Leaves out tokens at the input of the first block of a stream that is pruned. It scores nothing.

    A tower returns dropped tokens in the state in which they were dropped. What reads them beside the survivors would pay for
    them, and attend to what no longer follows the image.

    Args:
        spec: that of the first site of the stream.
        control: shared by all sites of the model.
    """

    def __init__(self, spec: SiteSpec, control: PruningControl) -> None:
        super().__init__()
        self.spec, self.control = spec, control
        self.name = spec.name + SUFFIX

    def forward(self, tokens: Tensor) -> tuple[Tensor, TokenState]:
        """Return the tokens that enter as packed rows ``[1, T, C]``, and their state; ``tokens [B, N, C]`` if all do."""
        before = unpruned_state(tokens.size(0), tokens.size(1))
        if is_compiling():
            return tokens, before
        kept = self._kept(before) if self.control.active else None
        rows, after = tokens.flatten(0, 1), before
        if kept is not None and self.control.in_place:
            after = hide_dropped(before, kept.to(tokens.device))
        elif kept is not None:
            decision = Decision(on_host(kept), [], merges=False)
            rows, after = assemble(rows, before, decision, self.control.config, causal=self.spec.causal)
        self.control.record.states[self.name] = after
        return (tokens if after.index is None else rows[None]), after

    def _kept(self, before: TokenState) -> Tensor | None:
        """Which tokens enter, ``[B, N]`` bool; None if all do."""
        control = self.control
        if control.forced is not None and self.name in control.forced:
            return control.forced[self.name]
        dropped = control.scope.dropped_features
        if dropped is None or control.config.batching != "ragged":
            return None
        dropped = dropped.repeat(before.batch // dropped.size(0), 1)  # a sample alone may run twice
        forced = None if control.forced is None else control.forced.get(self.spec.name)
        if forced is not None and bool((forced & dropped).any()):  # what is forced to survive has entered
            return None
        return ~dropped
