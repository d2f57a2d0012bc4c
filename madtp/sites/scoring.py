"""What a site learns from its block's attention: which tokens receive attention, and which are padding.

Start at :class:`ScoringAttention`, which replaces the self-attention of a block. :class:`ScoringMap` observes an attention map
that keeps the model's own spelling.

Axis legend: B samples, H heads, N slots, N0 original tokens, C width of the stream, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from madtp.config import PruningConfig
from madtp.method.importance import AttentionStatistics, attention_statistics
from madtp.sites.control import PruningControl
from madtp.tokens.attention import (
    AttentionInputs,
    AttentionOptions,
    mask_of_survivors,
    plain_attention,
    valid_keys,
)
from madtp.tokens.packed_attention import packed_attention, packed_attention_with_statistics
from madtp.tokens.sampled_scores import attention_with_sampled_statistics
from madtp.tokens.scored_attention import Slot
from madtp.tokens.segments import SegmentMap, special_slots
from madtp.tokens.state import TokenState, positions_of, slots_of, unpruned_state

if TYPE_CHECKING:
    from typing_extensions import Unpack

Scores = Literal["attention", "windows", "none"]
"""Which tokens a block's attention scores: all of them, those within windows of a grid, or none."""


@dataclass(frozen=True)
class SegmentSpec:
    """A segment of a stream that several modalities share.

    Attributes:
        modality: "image" or "text".
        pruned: whether its tokens are pruned.
        protected: positions in the segment that are never pruned.
    """

    modality: str
    pruned: bool
    protected: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """A pruning site, as the plan describes it.

    Attributes:
        name: unique name of the site.
        modality: modality of its stream.
        width: C, the width of its stream.
        class_position: position of the class token. None if there is none, or if the graph computes it.
        protected: positions that are never pruned.
        causal: tokens see only earlier ones.
        segments: segments of a stream that several modalities share, in the order of their numbers.
        keeps_last: the last token of each sample that is not padding is never pruned, and stands in for the class token.
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
"""An original position: ``[B]``, or one for all samples."""


class BlockAttention(NamedTuple):
    """Statistics that a site gets from its block's attention.

    Attributes:
        statistics: what the importance needs. None while pruning is off.
        valid: ``[B, N]`` bool, False on padding. None if no token is padding, or while pruning is off.
        protected: ``[B, N]`` bool, the tokens that are never pruned. None if that was not asked.
    """

    statistics: AttentionStatistics | None = None
    valid: Tensor | None = None
    protected: Tensor | None = None


def grid_attention(received: Tensor | None, state: TokenState | None, dims: tuple[int, int]) -> BlockAttention:
    """Return the statistics of the survivors from attention on the grid of all tokens.

    Args:
        received: the attention that each of the N0 original tokens received. None if that is not known.
        state: state of the tokens; None at the first site of a stream.
        dims: the dimensions of B and N0 in ``received``, which has a third dimension of size 1.
    """
    valid = None if state is None else state.valid
    if received is not None:
        received = received.movedim(dims, (0, 1)).flatten(1)
        if state is not None and state.index is not None:
            received = received.gather(1, state.index)
    return BlockAttention(AttentionStatistics(received, None, None), valid)


@dataclass(frozen=True)
class TokenRoles:
    """Which part each token plays in the statistics of an attention.

    Attributes:
        valid: ``[B, N]`` bool, False on padding; None if no token is padding.
        protected: ``[B, N]`` bool, the tokens that are never pruned.
        counted: ``[B, N]`` bool, the queries that count in the attention that a token receives: neither protected nor padding.
        class_slot: slot of the class token, or of the token that replaces it, ``[B]`` or one for all samples; None if there
            is none.
    """

    valid: Tensor | None
    protected: Tensor
    counted: Tensor
    class_slot: Slot | None


class _Scoring(nn.Module):
    """Base of the modules that observe an attention for a site."""

    def __init__(self, spec: SiteSpec, control: PruningControl) -> None:
        super().__init__()
        self.spec = spec
        self.control = control

    def roles(
        self,
        state: TokenState,
        readouts: tuple[Position, ...],
        segments: SegmentMap | None,
        shown: Callable[[], Tensor | None],
        device: torch.device,
    ) -> TokenRoles:
        """Return which part each token plays.

        Args:
            state: the state of the tokens.
            readouts: original positions that the graph reads.
            segments: which token belongs to which segment.
            shown: computes which keys ``[B, N]`` the attention shows to some query; None if all.
            device: the device of the tokens.
        """
        valid = self._valid(state, shown)
        guarded = protected_readouts(readouts, self.control.config)
        protected = protected_slots(self.spec, state, guarded, segments, valid, device)
        counted = ~protected if valid is None else valid & ~protected
        return TokenRoles(valid, protected, counted, self._class_slot(state, readouts, valid, segments, device))

    def _valid(self, state: TokenState, shown: Callable[[], Tensor | None]) -> Tensor | None:
        if self.control.config.padding == "scored":
            return None
        if state.index is None:
            return shown()
        if all(segment.pruned for segment in self.spec.segments):
            return state.valid
        # Padding stays in a segment that is not pruned, so only the mask tells it.
        seen = shown()
        return seen if state.valid is None else state.valid if seen is None else state.valid & seen

    def _class_slot(
        self,
        state: TokenState,
        readouts: tuple[Position, ...],
        valid: Tensor | None,
        segments: SegmentMap | None,
        device: torch.device,
    ) -> Slot | None:
        batch = state.batch
        position = self.spec.class_position
        if self.spec.causal and self.control.config.causal_class_row == "first":
            return 0
        if position == 0 and not (self.spec.causal and readouts):
            return 0  # survivors stand in the order of their positions, or protected ones stand first
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
        present_mask: Tensor | None = None,
        state: TokenState | None = None,
        readouts: tuple[Position, ...] = (),
        segments: SegmentMap | None = None,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, BlockAttention]:
        """Compute the attention as :func:`madtp.tokens.attention.attention` does, and observe it.

        Args:
            query: as in :func:`~madtp.tokens.attention.attention`, and so are all arguments up to ``present_mask``, and
                ``options``.
            state: state of the stream; None at its first site.
            readouts: original positions that the graph reads, ``[B]`` or one for all samples. The first stands in for the
                class token where there is none.
            segments: which token belongs to which segment; None if the stream has no segments.

        Returns:
            The output ``[B, H, N, D]``, and what the site needs of the attention.
        """
        inputs = AttentionInputs(query, key, value, mask, dropout_p, causal, **options)
        inputs = inputs.over_survivors(state, state, present_mask)
        if not self.control.active:
            return plain_attention(inputs), BlockAttention()
        roles = self.roles(
            state if state is not None else unpruned_state(query.size(0), query.size(2)),
            readouts,
            segments,
            lambda: valid_keys(inputs.mask, query.size(0), key.size(2)),
            query.device,
        )
        output, statistics = attention_with_sampled_statistics(
            inputs, counted=roles.counted, class_slot=roles.class_slot, queries=self.control.config.score_queries
        )
        return output, BlockAttention(statistics, roles.valid, roles.protected)


class PackedScoringAttention(_Scoring):
    """The self-attention of a block of a packed stream that is followed by a site."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        causal: bool = False,
        *,
        state: TokenState,
        readouts: tuple[Position, ...] = (),
        segments: SegmentMap | None = None,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, BlockAttention]:
        """Compute the attention as :func:`madtp.tokens.packed_attention.packed_attention` does, and observe it.

        Args:
            query: rows ``[1, H, T, D]``, and so are ``key`` and ``value``; ``mask``, ``dropout_p``, ``causal`` and ``options``
                are as in :func:`~madtp.tokens.packed_attention.packed_attention`.
            state: state of the rows.
            readouts: as in :class:`ScoringAttention`, and so are ``segments``.

        Returns:
            The output ``[1, H, T, D]``, and what the site needs of the attention.
        """
        inputs = AttentionInputs(query, key, value, mask, dropout_p, causal, **options)
        if not self.control.active:
            output = packed_attention(
                query, key, value, mask, dropout_p, causal, query_state=state, key_state=state, **options
            )
            return output, BlockAttention()

        def shown() -> Tensor | None:
            return valid_keys(mask_of_survivors(inputs, state, state, None)[0], state.batch, state.length)

        roles = self.roles(state, readouts, segments, shown, query.device)
        output, statistics = packed_attention_with_statistics(
            inputs,
            state,
            counted=roles.counted,
            class_slot=roles.class_slot,
            queries=self.control.config.score_queries,
        )
        return output, BlockAttention(statistics, roles.valid, roles.protected)


class ScoringMap(_Scoring):
    """Observes an attention map that keeps its own spelling. Its weights may be negative; their absolute values count."""

    def forward(
        self,
        weights: Tensor,
        output: Tensor,
        *,
        state: TokenState | None = None,
        readouts: tuple[Position, ...] = (),
        segments: SegmentMap | None = None,
    ) -> BlockAttention:
        """Return what the site needs of an attention map. Keys to which no query of any head gives weight are padding.

        Args:
            weights: ``[B, H, N, N]``.
            output: ``[B, H, N, D]``.
            state: as in :class:`ScoringAttention`, and so are ``readouts`` and ``segments``.
        """
        if not self.control.active:
            return BlockAttention()
        batch, _, count, _ = weights.shape
        sizes = weights.detach().float().abs()
        roles = self.roles(
            state if state is not None else unpruned_state(batch, count),
            readouts,
            segments,
            lambda: sizes.gt(0).any(2).any(1),
            weights.device,
        )
        statistics = attention_statistics(weights.float().abs(), output.float(), roles.counted, roles.class_slot)
        return BlockAttention(statistics, roles.valid, roles.protected)


def _from_start(position: int, state: TokenState) -> int:
    return position + state.full_length if position < 0 else position


def protected_readouts(readouts: tuple[Position, ...], config: PruningConfig) -> tuple[Position, ...]:
    """Return the positions that the graph reads and that must survive; the authors' code protects none."""
    return readouts if config.readout == "remapped" else ()


def last_slots(state: TokenState, valid: Tensor | None, device: torch.device) -> Tensor:
    """Return the slot of the last token of each sample that is not padding, ``[B]``; ``valid`` is ``[B, N]``."""
    index = positions_of(state, device)
    excluded = torch.zeros_like(index, dtype=torch.bool) if valid is None else ~valid
    return index.masked_fill(excluded if state.merged is None else excluded | state.merged, -1).argmax(1)


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
    found += [index == _from_start(position, state) for position in spec.protected]
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
