"""What may become of an attempt, and what an attempt may take: :class:`Verdict`, :class:`Limits`."""

from __future__ import annotations

from dataclasses import dataclass

LOADED, REFUSED = "loaded", "refused"
WRONG, EXCEPTION, SLOW, LARGE, CRASH = "wrong", "exception", "slow", "large", "crash"
ALLOWED = (LOADED, REFUSED)
FAULTS = (WRONG, EXCEPTION, SLOW, LARGE, CRASH)
"""Loaded or left otherwise than is right, another exception than madtp's, too slow, too large, and the end of the process."""


@dataclass(frozen=True)
class Limits:
    """What an attempt may take.

    Attributes:
        seconds: from the changed input to its outcome.
        bytes: of memory, at the peak, more than before.
    """

    seconds: float = 10.0
    bytes: int = 1 << 30


STANDARD = Limits()


@dataclass(frozen=True)
class Verdict:
    """What became of an attempt.

    Attributes:
        kind: one of :data:`ALLOWED` or :data:`FAULTS`.
        message: of the error, in a line; empty where the input was loaded.
        where: file and line that an unexpected exception came from.
        seconds: that reading took.
        bytes: by which the memory of the process grew.
    """

    kind: str
    message: str = ""
    where: str = ""
    seconds: float = 0.0
    bytes: int = 0

    @property
    def allowed(self) -> bool:
        """Whether the input was loaded or refused as it should be."""
        return self.kind in ALLOWED
