"""What the slots of a stream hold, on the host: :class:`HostTokens`, which a state carries to the next site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from madtp.method.arrays import Flags, Numbers


@dataclass(frozen=True)
class HostTokens:
    """What slots hold, as arrays on the host, so that the next site need not wait for the device to tell.

    Attributes:
        of: the index of the state that they are a copy of.
        index: as in :class:`~madtp.tokens.state.TokenState`.
        merged: as in :class:`~madtp.tokens.state.TokenState`.
    """

    of: Tensor
    index: Numbers
    merged: Flags
