"""What the last forward did: start at :class:`ForwardRecord`; :class:`Records` keeps one for each thread and task."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from madtp.tokens.cache_bytes import CacheBytes
from madtp.tokens.state import TokenState

if TYPE_CHECKING:
    from madtp.programs.program import Run


class FeatureKey(NamedTuple):
    """The site and the modality whose tokens were pooled."""

    site: str
    modality: str


@dataclass
class ForwardRecord:
    """What the last forward did.

    Attributes:
        states: the state after each site.
        features: pooled features C_l ``[B, K, d_e]``.
        kept_counts: number ``[B]`` of candidates that each site kept, by site (``site[modality]`` for a segment).
        runs: the programs that ran, in order.
        outside_macs: multiply-accumulates per sample that no program did. None if they were not counted.
        batch: number of samples. None if it is not known.
        cache_bytes: memory of the key/value caches that the programs filled. None if they filled none.
        outdated: a call has begun since. The record is replaced when the first program of that call runs.
    """

    states: dict[str, TokenState] = field(default_factory=dict)
    features: dict[FeatureKey, Tensor] = field(default_factory=dict)
    kept_counts: dict[str, Tensor] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    outside_macs: float | None = None
    batch: int | None = None
    cache_bytes: CacheBytes | None = None
    outdated: bool = False


class _Owner:
    """Stands for the context that a record belongs to. The record lives as long as this and the model do."""


class Records:
    """The record of the last forward, by context: calls in other threads and tasks do not change one's own.

    Attributes:
        latest: the last record of any context, for those who have made no call themselves.
    """

    def __init__(self) -> None:
        self._owner: ContextVar[_Owner | None] = ContextVar("owner of the last forward", default=None)
        self._records: WeakKeyDictionary[_Owner, ForwardRecord] = WeakKeyDictionary()
        self.latest = ForwardRecord()

    @property
    def own(self) -> ForwardRecord:
        """The record that calls in this context write to."""
        owner = self._owner.get()
        found = None if owner is None else self._records.get(owner)
        return self.begin(ForwardRecord(outdated=True)) if found is None else found

    def last(self) -> ForwardRecord:
        """The record to read: that of this context's last forward, or of the last one anywhere."""
        own = self.own
        return own if own.runs else self.latest

    def begin(self, record: ForwardRecord) -> ForwardRecord:
        """Make ``record`` the one that calls in this context write to; contexts that were copied from it keep theirs."""
        owner = _Owner()
        self._owner.set(owner)
        self._records[owner] = record
        return record

    def clear(self) -> None:
        """Forget the last forward."""
        self.latest = self.begin(ForwardRecord(outdated=self.own.outdated))
