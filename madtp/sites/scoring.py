"""What a site learns from its block's attention: which tokens receive weight, and which are padding.

Start at :class:`ScoringAttention`, which replaces the self-attention of a block; :class:`ScoringMap` looks at an attention map
that keeps the model's own spelling.

Axis legend: B samples, H heads, N slots, N0 original tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from madtp.config import PruningConfig
from madtp.method.importance import AttentionStatistics, attention_statistics
from madtp.sites.control import PruningControl
from madtp.tokens.attention import attention, attention_with_statistics, mask_of_survivors, valid_keys
from madtp.tokens.segments import SegmentMap, special_slots
from madtp.tokens.state import TokenState, positions_of, slots_of, untouched

Scores = Literal["attention", "windows", "none"]


@dataclass(frozen=True)
class SegmentSpec:
    """A segment of a stream that several modalities share: whether it is pruned, positions in it that never are."""

    modality: str
    pruned: bool
    protected: tuple[int, ...] = ()


@dataclass(frozen=True)
class SiteSpec:
    """What a site has to know, from the plan.

    name: unique name of the site. modality: of its stream. width: C. class_position: position of the class token,
    None if there is none or a graph value says it. protected: positions that are never pruned. causal: whether tokens
    see only earlier ones. segments: of a stream that several modalities share, in the order of their numbers. keeps_last: the
    last token of each sample that is no padding is never pruned, and stands in for the class token.
    """

    name: str
    modality: str
    width: int
    class_position: int | None
    protected: tuple[int, ...]
    causal: bool
    segments: tuple[SegmentSpec, ...] = ()
    keeps_last: bool = False


Position = Tensor | int


class Seen(NamedTuple):
    """What the scoring attention saw: statistics, None while pruning is off, and which keys are not padding."""

    statistics: AttentionStatistics | None
    valid: Tensor | None


def seen_on_grid(tokens: Tensor, received: Tensor | None, state: TokenState | None, dims: tuple[int, int]) -> Seen:
    """What attention on a grid of all tokens tells of those that are left.

    Args:
        tokens: ``[B, N, C]``. state: of them, None at the first site of a stream.
        received: how much attention each of the N0 original tokens received, B and N0 at ``dims``, 1 at the third dimension;
            None if that is not known.
    """
    valid = None if state is None else state.valid
    if received is not None:
        received = received.movedim(dims, (0, 1)).reshape(tokens.size(0), -1)
        if state is not None and state.index is not None:
            received = received.gather(1, state.index)
    return Seen(AttentionStatistics(received, None, None), valid)


class _Scoring(nn.Module):
    """What looks at attention for a site."""

    def __init__(self, spec: SiteSpec, control: PruningControl) -> None:
        super().__init__()
        self.spec = spec
        self.control = control

    def _valid(self, state: TokenState | None, shown: Callable[[], Tensor | None]) -> Tensor | None:
        """``[B, N]`` which tokens are not padding, None if all are; ``shown``: which keys attention shows to some query."""
        if self.control.config.padding == "scored":
            return None
        if state is None or state.index is None:
            return shown()
        if all(segment.pruned for segment in self.spec.segments):
            return state.valid
        # Padding stays in a segment that is left alone, so the mask has to tell it at every site.
        seen = shown()
        return seen if state.valid is None else state.valid if seen is None else state.valid & seen

    def _rows(
        self,
        state: TokenState,
        valid: Tensor | None,
        readouts: tuple[Position, ...],
        segments: SegmentMap | None,
        device: torch.device,
    ) -> Tensor:
        """``[B, N]`` the queries that count: neither protected ones nor padding."""
        guarded = protected_readouts(readouts, self.control.config)
        rows = torch.ones(state.batch, state.length, dtype=torch.bool, device=device) if valid is None else valid
        return rows & ~protected_slots(self.spec, state, guarded, segments, rows)

    def _class_slot(
        self,
        state: TokenState,
        readouts: tuple[Position, ...],
        valid: Tensor | None,
        segments: SegmentMap | None,
        device: torch.device,
    ) -> Tensor | None:
        """Slots ``[B]`` of the class tokens, or of what stands in for them; None where nothing does."""
        batch = state.batch
        position = self.spec.class_position
        if self.spec.causal and self.control.config.causal_class_row == "first":
            return torch.zeros(batch, dtype=torch.long, device=device)
        if position is not None and not (self.spec.causal and readouts):
            return slots_of(state, torch.full((batch,), _from_start(position, state), device=device))
        if readouts:
            first = readouts[0]
            return slots_of(state, first if isinstance(first, Tensor) else torch.full((batch,), first, device=device))
        if segments is not None and segments.special is not None and bool(segments.special.any()):
            return slots_of(state, segments.special.int().argmax().expand(batch))
        return last_slots(state, valid, device) if self.spec.keeps_last else None


class ScoringAttention(_Scoring):
    """The self-attention of a block that is followed by a site."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        causal: bool = False,
        *,
        scale: float | None = None,
        grouped: bool = False,
        softcap: float | None = None,
        present_mask: Tensor | None = None,
        state: TokenState | None = None,
        readouts: tuple[Position, ...] = (),
        segments: SegmentMap | None = None,
    ) -> tuple[Tensor, Seen]:
        """Attention as :func:`madtp.tokens.attention.attention`, and what the site needs of it.

        Args:
            state: of the stream, None at its first site.
            readouts: original positions that the graph reads, ``[B]`` or one for all; the first stands in for the class
                token where there is none.
            segments: which token is of which segment.
        """
        if not self.control.active:
            output = attention(
                query,
                key,
                value,
                mask,
                dropout_p,
                causal,
                scale=scale,
                grouped=grouped,
                softcap=softcap,
                present_mask=present_mask,
                query_state=state,
                key_state=state,
            )
            return output, Seen(None, None)
        present, still_causal = mask_of_survivors(query, key, mask, causal, present_mask, state, state)
        batch, count = query.size(0), query.size(2)
        valid = self._valid(state, lambda: valid_keys(present, batch, key.size(2)))
        positions = state if state is not None else untouched(batch, count)
        slot = self._class_slot(positions, readouts, valid, segments, query.device)
        rows = self._rows(positions, valid, readouts, segments, query.device)
        output, statistics = attention_with_statistics(
            query,
            key,
            value,
            present,
            dropout_p,
            still_causal,
            scale=scale,
            grouped=grouped,
            softcap=softcap,
            rows=rows,
            class_slot=slot,
        )
        return output, Seen(statistics, valid)


class ScoringMap(_Scoring):
    """Looks at an attention map that keeps its own spelling. Its weights may have any sign; their size is what counts."""

    def forward(
        self,
        weights: Tensor,
        output: Tensor,
        *,
        state: TokenState | None = None,
        readouts: tuple[Position, ...] = (),
        segments: SegmentMap | None = None,
    ) -> Seen:
        """What the site needs of a map ``[B, H, N, N]`` and what it gave, ``[B, H, N, D]``; see :class:`ScoringAttention`.

        Padding is what no query of any head gives weight.
        """
        if not self.control.active:
            return Seen(None, None)
        batch, _, count, _ = weights.shape
        sizes = weights.detach().float().abs()
        valid = self._valid(state, lambda: sizes.gt(0).any(2).any(1))
        positions = state if state is not None else untouched(batch, count)
        slot = self._class_slot(positions, readouts, valid, segments, weights.device)
        rows = self._rows(positions, valid, readouts, segments, weights.device)
        return Seen(attention_statistics(weights.float().abs(), output.float(), rows, slot), valid)


def _from_start(position: int, state: TokenState) -> int:
    return position + state.full_length if position < 0 else position


def protected_readouts(readouts: tuple[Position, ...], config: PruningConfig) -> tuple[Position, ...]:
    """The computed positions that must survive: the authors' code protects none."""
    return readouts if config.readout == "remapped" else ()


def last_slots(state: TokenState, valid: Tensor | None, device: torch.device) -> Tensor:
    """Slots ``[B]`` of the last token of each sample that is no padding (``valid [B, N]``)."""
    index = positions_of(state, device)
    gone = torch.zeros_like(index, dtype=torch.bool) if valid is None else ~valid
    return index.masked_fill(gone if state.merged is None else gone | state.merged, -1).argmax(1)


def protected_slots(
    spec: SiteSpec,
    state: TokenState,
    readouts: tuple[Position, ...],
    segments: SegmentMap | None,
    valid: Tensor,
) -> Tensor:
    """``[B, N]`` slots that hold protected tokens, be they text padding; slots that only fill up the batch hold none.
    ``valid [B, N]``: which are no padding."""
    device = valid.device
    index = positions_of(state, device)
    protected = torch.zeros_like(index, dtype=torch.bool)
    if segments is not None:
        protected = special_slots(segments, [segment.protected for segment in spec.segments], state)
    for position in spec.protected:
        protected = protected | (index == _from_start(position, state))
    for positions in readouts:
        wanted = positions[:, None].to(index.dtype) if isinstance(positions, Tensor) else positions
        protected = protected | (index == wanted)
    if spec.keeps_last:
        slots = torch.arange(state.length, device=device)
        protected = protected | (slots == last_slots(state, valid, device)[:, None])
    if state.valid is not None:
        protected = protected & state.valid
    return protected if state.merged is None else protected & ~state.merged
