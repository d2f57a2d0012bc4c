"""Readouts: places where a graph reads tokens by their position, reduces over them, or begins a new axis.

Start at :class:`Readout`. Each kind of readout is a class with the fields that it needs. Detection tells from them what
becomes of a stream; insertion remaps them to the tokens that survive (``insert/repairs.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriters.axes.labels import Axis
from rewriters.axes.sources import Bound


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What reads a token axis.

    Attributes:
        axis: The token axis.
        dim: The dimension that runs along it.
    """

    axis: Axis
    dim: int


@dataclass(frozen=True, kw_only=True)
class TokenReadout(Readout):
    """A readout of the tokens of each sample.

    Attributes:
        batch_dim: The dimension that is the batch.
    """

    batch_dim: int


@dataclass(frozen=True, kw_only=True)
class PositionReadout(TokenReadout):
    """The token at a constant ``position``; ``keepdim`` leaves a dimension of size 1."""

    position: int
    keepdim: bool = False


@dataclass(frozen=True, kw_only=True)
class IndexReadout(TokenReadout):
    """One token of each sample, at a position that ``index`` computes; ``keepdim`` leaves a dimension of size 1."""

    index: fx.Node
    keepdim: bool = False


@dataclass(frozen=True, kw_only=True)
class PrefixReadout(TokenReadout):
    """The first ``length`` tokens."""

    length: int


@dataclass(frozen=True, kw_only=True)
class RestReadout(TokenReadout):
    """All tokens but the first ``start``."""

    start: int


@dataclass(frozen=True, kw_only=True)
class RangeReadout(TokenReadout):
    """The tokens from ``start`` to ``end``."""

    start: Bound
    end: Bound


@dataclass(frozen=True, kw_only=True)
class RangesReadout(TokenReadout):
    """Consecutive ranges of tokens, which begin at ``starts``."""

    starts: tuple[Bound, ...]


@dataclass(frozen=True, kw_only=True)
class PoolingReadout(TokenReadout):
    """A mean or a maximum over tokens."""


@dataclass(frozen=True, kw_only=True)
class MaskedMeanReadout(TokenReadout):
    """A weighted mean over tokens."""


@dataclass(frozen=True, kw_only=True)
class LengthReadout(Readout):
    """The number of tokens."""


@dataclass(frozen=True, kw_only=True)
class BatchReadout(Readout):
    """Parts of the batch; the token axis goes on in each of them.

    Attributes:
        dim: The dimension that is the batch.
        sizes: Entries of each part; empty for a slice or a repetition.
    """

    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ConcatenationReadout(Readout):
    """A concatenation with other tokens, in which the axis goes on."""


@dataclass(frozen=True, kw_only=True)
class RejoinedReadout(TokenReadout):
    """Consecutive ranges of tokens, which begin at ``starts``, one after the other: all tokens of the axis again."""

    starts: tuple[Bound, ...]


# Of these the readers see a few tokens, or one value, for each sample.
CONDENSED = (PositionReadout, IndexReadout, PrefixReadout, RestReadout, PoolingReadout, MaskedMeanReadout)
