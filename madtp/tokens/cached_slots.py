"""Which tokens the slots of a key/value cache hold, once a pruned call has dropped some: :class:`CachedSlots`.

A cache goes on as if all tokens were there: its tokens are counted by their original positions. First come the slots of the
pruned call, whose tokens stand at positions of their own in each sample; behind them, one slot for every later token.

Axis legend: B samples, N positions, S slots of the pruned call, M slots in all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from madtp.tokens.state import TokenState, gather_positions, marked_first, positions_of

FEW = 16
"""Number of empty slots that are not worth moving the others for."""


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the tokens of a cached tensor come from: equal for tensors that hold the same ones.

    Attributes:
        index: of the state that they were along.
        steps: what was done with samples and ranges of tokens since.
    """

    index: Tensor | None
    steps: tuple[object, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin) and self.index is other.index and self.steps == other.steps

    def __hash__(self) -> int:
        return hash((id(self.index), self.steps))

    def after(self, *step: object) -> Origin:
        """The origin after one more step."""
        return Origin(self.index, (*self.steps, step))


@dataclass(frozen=True, eq=False)
class CachedSlots:
    """Which tokens the slots of a cached tensor hold.

    Attributes:
        length: N, the number of positions.
        index: ``[B, S]`` the position of the token in each slot of the pruned call.
        count: M, the number of slots; those from S on hold the last M - S positions.
        valid: ``[B, S]`` bool, False where a slot holds no token. None if all hold one.
        origin: where its tokens come from.
        unfolded: the slots before heads were folded into the batch; None if they were not.
    """

    length: int
    index: Tensor
    count: int
    valid: Tensor | None = None
    origin: Origin = field(default_factory=lambda: Origin(torch.empty(0)))
    unfolded: CachedSlots | None = None

    @property
    def batch(self) -> int:
        """B, the number of samples."""
        return self.index.size(0)

    @property
    def first(self) -> int:
        """S, the number of slots of the pruned call."""
        return self.index.size(1)

    @property
    def later(self) -> int:
        """The number of slots of later tokens."""
        return self.count - self.first

    def holds_the_same(self, other: CachedSlots) -> bool:
        """Whether another tensor's slots hold the same tokens."""
        same = self.origin == other.origin and self.length == other.length
        return same and self.count == other.count and self.index.shape == other.index.shape

    def positions(self) -> Tensor:
        """The position of the token in each slot, ``[B, M]``."""
        later = torch.arange(self.length - self.later, self.length, device=self.index.device)
        return torch.cat([self.index, later.expand(self.batch, -1)], 1) if self.later else self.index

    def all_valid(self) -> Tensor | None:
        """Which slots hold a token, ``[B, M]`` bool; None if all do."""
        if self.valid is None:
            return None
        return torch.nn.functional.pad(self.valid, (0, self.later), value=True)

    def fit(self, side: Tensor, dim: int, batch_dim: int, rank: int) -> Tensor:
        """Gather a tensor along all positions so that it fits the slots.

        Args:
            side: broadcasts to ``rank`` dimensions, with size N or 1 at ``dim``.
            dim: token dimension of the broadcast result.
            batch_dim: batch dimension of the broadcast result.
            rank: number of dimensions of the broadcast result.
        """
        at = dim - rank + side.dim()
        if at < 0 or side.size(at) == 1:
            return side
        gathered = gather_positions(side, self.index, dim, batch_dim, rank)
        if not self.later:
            return gathered
        later = side.narrow(at, self.length - self.later, self.later)
        later = later[(None,) * (rank - later.dim())]
        if later.size(batch_dim) != gathered.size(batch_dim):
            later = later.expand(*(gathered.size(d) if d == batch_dim else -1 for d in range(rank)))
        return torch.cat([gathered, later], dim)

    def with_later(self, tokens: int) -> CachedSlots:
        """The slots with further tokens appended."""
        unfolded = None if self.unfolded is None else self.unfolded.with_later(tokens)
        # Each layer does this at each step, and `replace` takes longer.
        return CachedSlots(self.length + tokens, self.index, self.count + tokens, self.valid, self.origin, unfolded)

    def selected(self, samples: Tensor | slice) -> CachedSlots:
        """The slots of some samples."""
        valid = None if self.valid is None else self.valid[samples]
        step = str(samples) if isinstance(samples, slice) else "some"
        origin = self.origin.after("selected", step)
        return replace(self, index=self.index[samples], valid=valid, origin=origin, unfolded=None)

    def repeated(self, times: int) -> CachedSlots:
        """The slots with each sample ``times`` times, one behind the other."""
        if times == 1:
            return self
        valid = None if self.valid is None else self.valid.repeat_interleave(times, 0)
        index, origin = self.index.repeat_interleave(times, 0), self.origin.after("repeated", times)
        return replace(self, index=index, valid=valid, origin=origin, unfolded=None)

    def folded(self, rows: int) -> CachedSlots | None:
        """The slots of a batch of ``rows``, into which heads are folded or out of which they are taken; None if neither."""
        if self.unfolded is not None and rows == self.unfolded.batch:
            return self.unfolded
        if rows == self.batch:
            return self
        return replace(self.repeated(rows // self.batch), unfolded=self) if rows % self.batch == 0 else None

    def to(self, device: torch.device) -> CachedSlots:
        """The slots on a device."""
        valid = None if self.valid is None else self.valid.to(device)
        return replace(self, index=self.index.to(device), valid=valid, unfolded=None)

    def without_empty(self) -> tuple[CachedSlots, Tensor] | None:
        """The slots without those that cannot hold a token, because fewer positions are left, and where these are, ``[B, M]``.

        Nothing is read on the host, so others may stay empty. None while there are few of them.
        """
        left = self.length - self.later
        if self.valid is None or self.first - left < max(FEW, self.length // 8):
            return None
        order = marked_first(self.valid)[:, :left]
        later = torch.arange(self.first, self.count, device=order.device).expand(self.batch, -1)
        index, valid = self.index.gather(1, order), self.valid.gather(1, order)
        kept = replace(self, index=index, valid=valid, count=left + self.later, origin=self.origin.after("compacted"))
        return kept, torch.cat([order, later], 1)

    def between(self, start: int, stop: int) -> tuple[CachedSlots, slice]:
        """The slots of the positions from ``start`` to ``stop``, and where these slots lie among all.

        Slots of the pruned call stay and are marked as empty where their tokens leave: which these are depends on values.
        """
        first_later = self.length - self.later
        length = max(0, stop - start)
        origin = self.origin.after("between", start, stop)
        if start >= first_later:
            slots = slice(self.first + start - first_later, self.first + max(start, stop) - first_later)
            none = self.index[:, :0]
            empty = replace(self, length=length, index=none, valid=None, count=length)
            return replace(empty, origin=origin, unfolded=None), slots
        inside = self.index >= start
        if stop < first_later:
            inside = inside & (self.index < stop)
        left = (
            self.valid if start == 0 and stop >= first_later else inside if self.valid is None else self.valid & inside
        )
        later = max(0, stop - first_later)
        count = self.first + later
        moved = replace(self, length=length, index=(self.index - start).clamp(0, max(0, length - 1)), valid=left)
        return replace(moved, count=count, origin=origin, unfolded=None), slice(0, count)


def slots_of_state(state: TokenState, device: torch.device) -> CachedSlots:
    """Return the slots of a tensor along the tokens of ``state``."""
    index, valid = positions_of(state, device), state.valid
    if valid is not None and bool(valid.all()):
        valid = None
    if valid is not None:
        index = index.masked_fill(~valid, 0)
    return CachedSlots(state.full_length, index, state.length, valid, Origin(state.index))
