"""What a site learns from its block's attention: which tokens receive attention, and which are padding.

Start at :class:`ScoringAttention`, which replaces the self-attention of a block. :class:`ScoringMap` observes an attention map
that keeps the model's own spelling.

Axis legend: B samples, H heads, N slots, N0 original tokens, C width of the stream, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from madtp.method.importance import AttentionStatistics, attention_statistics
from madtp.sites.control import PruningControl
from madtp.sites.protection import (
    Position,
    first_slots,
    from_start,
    last_slots,
    protected_readouts,
    protected_slots,
    unpruned_slots,
)
from madtp.sites.spec import SiteSpec
from madtp.tokens.attention import (
    AttentionInputs,
    AttentionOptions,
    mask_of_survivors,
    plain_attention,
    valid_keys,
)
from madtp.tokens.packed_attention import packed_attention, packed_attention_with_statistics
from madtp.tokens.sampled_scores import attention_with_sampled_statistics
from madtp.tokens.scored_attention import Asked, Counted, Slot
from madtp.tokens.segments import SegmentMap
from madtp.tokens.state import TokenState, slots_if_held, slots_of, unpruned_state

if TYPE_CHECKING:
    from typing_extensions import Unpack

WORDS_ASKED = 64
"""Number of words of a prompt that say which image tokens a language model attends to."""

Scores = Literal["attention", "windows", "none"]
"""Which tokens a block's attention scores: all of them, those within windows of a grid, or none."""


class BlockAttention(NamedTuple):
    """Statistics that a site gets from its block's attention.

    Attributes:
        statistics: what the importance needs. None while pruning is off.
        valid: ``[B, N]`` bool, False on padding. None if no token is padding, or while pruning is off.
        protected: ``[B, N]`` bool, the tokens that are never pruned, or P if the first P are and no others. None if that was
            not asked.
    """

    statistics: AttentionStatistics[Tensor] | None = None
    valid: Tensor | None = None
    protected: Tensor | int | None = None


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
    return BlockAttention(AttentionStatistics(received, None), valid)


@dataclass(frozen=True)
class TokenRoles:
    """Which part each token plays in the statistics of an attention.

    Attributes:
        valid: ``[B, N]`` bool, False on padding; None if no token is padding.
        protected: ``[B, N]`` bool, the tokens that are never pruned, or P if the first P are and no others.
        counted: ``[B, N]`` bool, the queries that count in the attention that a token receives: neither protected nor padding;
            or P if all but the first P do. In a language model whose words are not pruned, these words.
        class_slot: slot of the class token, or of the token that replaces it, ``[B]`` or one for all samples, -1 where a
            sample has none; None if there is none, or if nothing asks for it.
        queries: number of queries that are asked at most, if the configuration does not say; None for all.
    """

    valid: Tensor | None
    protected: Tensor | int
    counted: Counted
    class_slot: Slot | None
    queries: int | None = None

    def asked(self, control: PruningControl, *, windows: bool) -> Asked:
        """What the parts of the site ask of the attention. Within windows no query sees all tokens, and every one is asked."""
        return Asked(
            counted=self.counted,
            class_slot=None if windows else self.class_slot,
            by_output=control.parts.needs.class_attention,
            received=control.parts.needs.received,
            queries=None if windows else control.config.score_queries or self.queries,
        )


class _Scoring(nn.Module):
    """Base of the modules that observe an attention for a site.

    Attributes:
        packed: whether values are packed rows, which hold no padding.
    """

    packed: ClassVar[bool] = False

    def __init__(self, spec: SiteSpec, control: PruningControl) -> None:
        super().__init__()
        self.spec = spec
        self.control = control
        self.leading = spec.leading

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
        config = self.control.config
        valid = self._valid(state, shown)
        guarded = protected_readouts(readouts, config)
        needs = self.control.parts.needs
        class_slot: Slot | None = None
        if needs.last_token_attention:
            class_slot = last_slots(state, valid, device) if self.spec.causal else None
        elif needs.class_attention or needs.class_token_attention:
            class_slot = self._class_slot(state, readouts, valid, segments, device)
        if self.leading is not None and not guarded and config.padding == "excluded":
            counted: Counted = self.leading
            if valid is not None and not (self.packed and state.rows is not None and valid is state.valid):
                counted = valid & ~first_slots(self.leading, valid)
            return TokenRoles(valid, self.leading, counted, class_slot)
        protected = protected_slots(self.spec, state, guarded, segments, valid, device)
        if segments is not None and self.spec.causal and not all(segment.pruned for segment in self.spec.segments):
            words = unpruned_slots(self.spec, segments, state)
            words = words if valid is None else valid & words
            return TokenRoles(valid, protected, words, class_slot, WORDS_ASKED)
        return TokenRoles(valid, protected, ~protected if valid is None else valid & ~protected, class_slot)

    def _valid(self, state: TokenState, shown: Callable[[], Tensor | None]) -> Tensor | None:
        if self.control.config.padding == "scored":
            return None
        if state.index is None:
            return shown()
        if state.padding_known and all(segment.pruned for segment in self.spec.segments):
            return state.valid
        # Padding stays in a segment that is not pruned, and comes with tokens of another stream: only the mask tells it.
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
            return slots_if_held(state, torch.full((batch,), from_start(position, state), device=device))
        if readouts:
            # Handed down by a concatenation, it may lie in another part of it.
            first = readouts[0]
            return slots_if_held(
                state, first if isinstance(first, Tensor) else torch.full((batch,), first, device=device)
            )
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
        given = AttentionInputs(query, key, value, mask, dropout_p, causal, **options)
        inputs = given.over_survivors(state, state, present_mask)
        if not self.control.active:
            return plain_attention(inputs), BlockAttention()
        roles = self.roles(
            state if state is not None else unpruned_state(query.size(0), query.size(2)),
            readouts,
            segments,
            lambda: valid_keys(inputs.mask, query.size(0), key.size(2)),
            query.device,
        )
        asked = roles.asked(self.control, windows=given.windows is not None)
        output, statistics = attention_with_sampled_statistics(inputs, asked)
        return output, BlockAttention(statistics, roles.valid, roles.protected)


class PackedScoringAttention(_Scoring):
    """The self-attention of a block of a packed stream that is followed by a site."""

    packed = True

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
        asked = roles.asked(self.control, windows=inputs.windows is not None)
        output, statistics = packed_attention_with_statistics(inputs, state, asked)
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
        counted = roles.counted
        if not isinstance(counted, Tensor):
            everything = torch.ones(batch, count, dtype=torch.bool, device=weights.device)
            counted = ~first_slots(counted, everything)
        statistics = attention_statistics(weights.float().abs(), output.float(), counted, roles.class_slot)
        return BlockAttention(statistics, roles.valid, roles.protected)
