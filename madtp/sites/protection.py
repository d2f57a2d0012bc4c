"""Which tokens a site never drops: start at :func:`protected_slots`.

Axis legend: B samples, N slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.sites.spec import SiteSpec
from madtp.tokens.segments import SegmentMap, segment_slots, special_slots
from madtp.tokens.state import TokenState, positions_of

Position = Tensor | int
"""An original position: ``[B]``, or one for all samples."""


def from_start(position: int, state: TokenState) -> int:
    """Return an original position that may be counted from the end, counted from the start."""
    return position + state.full_length if position < 0 else position


def protected_readouts(readouts: tuple[Position, ...], config: PruningConfig) -> tuple[Position, ...]:
    """Return the positions that the graph reads and that must survive; the authors' code protects none."""
    return readouts if config.readout == "remapped" else ()


def first_slots(count: int, like: Tensor) -> Tensor:
    """Return which slots are the first ``count`` of their sample and True in ``like [B, N]``."""
    found = like.clone()
    found[:, count:] = False
    return found


def last_slots(state: TokenState, valid: Tensor | None, device: torch.device) -> Tensor:
    """Return the slot of the last token of each sample that is not padding, ``[B]``; ``valid`` is ``[B, N]``."""
    index = positions_of(state, device)
    excluded = torch.zeros_like(index, dtype=torch.bool) if valid is None else ~valid
    return index.masked_fill(excluded if state.merged is None else excluded | state.merged, -1).argmax(1)


def unpruned_slots(spec: SiteSpec, segments: SegmentMap, state: TokenState) -> Tensor:
    """Return which slots hold tokens of segments that are not pruned, such as text beside image tokens, ``[B, N]`` bool."""
    slots = segment_slots(segments, state)
    kept = torch.tensor([not segment.pruned for segment in spec.segments], device=slots.device)[slots]
    return kept if state.valid is None else kept & state.valid


def protected_slots(
    spec: SiteSpec,
    state: TokenState,
    readouts: tuple[Position, ...],
    segments: SegmentMap | None,
    valid: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return which slots hold protected tokens, ``[B, N]``; these may be padding of the text, but never padding slots.

    Args:
        spec: the spec of the site.
        state: the state of the tokens.
        readouts: original positions that must survive, from :func:`protected_readouts`.
        segments: which token belongs to which segment; None if the stream has no segments.
        valid: ``[B, N]`` bool, False on padding; None if there is none.
        device: the device of the tokens.
    """
    index = positions_of(state, device)
    found: list[Tensor] = []
    if segments is not None:
        found.append(special_slots(segments, [segment.protected for segment in spec.segments], state))
    found += [index == from_start(position, state) for position in spec.protected]
    for positions in readouts:
        wanted = positions[:, None].to(index.dtype) if isinstance(positions, Tensor) else positions
        found.append(index == wanted)
    if spec.keeps_last:
        slots = torch.arange(state.length, device=device)
        found.append(slots == last_slots(state, valid, device)[:, None])
    if not found:
        return torch.zeros(state.batch, state.length, dtype=torch.bool, device=device)
    protected = found[0]
    for one in found[1:]:
        protected = protected | one
    if state.valid is not None:
        protected = protected & state.valid
    return protected if state.merged is None else protected & ~state.merged
