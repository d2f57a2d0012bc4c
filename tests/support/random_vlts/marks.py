"""What the oracle must know about a module, stated where the module is written.

Modules that read keys, pool tokens or end a sublayer say so by these marks; none of them changes what is computed, and the
rewriter does not see them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

WIDTH = 16
VOCABULARY = 60
END = 59
PICTURE = 58
GRID = (4, 3)
PATCH = 4
PATCHES = GRID[0] * GRID[1]
LONGEST = 40


@dataclass(frozen=True)
class Reads:
    """An attention's keys: tokens of ``stream``, after the first ``sites`` places where it may be pruned (-1: after all)."""

    stream: str
    sites: int = -1


class Tap(nn.Module):
    """A place in a block where the residual value can be observed: behind the self-attention, or at the block's end."""

    def __init__(self, stream: str, layer: int, end: bool, sequence_first: bool) -> None:
        super().__init__()
        self.stream, self.layer, self.end, self.sequence_first = stream, layer, end, sequence_first

    def forward(self, x: Tensor) -> Tensor:
        return x


class Pooling(nn.Module):
    """Reads all tokens of a stream at once; :meth:`surviving` says what it reads once some of them are gone."""

    stream: str = ""

    def surviving(self, kept: Tensor, *arguments: Tensor | None) -> Tensor:
        """As ``forward``, over the tokens in ``kept`` [B, N]."""
        raise NotImplementedError
