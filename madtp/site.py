"""A pruning site: the place in a rewritten graph where one block's tokens are scored, kept, merged or dropped.

Start at :class:`PruningSite`. Its ``attention`` child replaces the block's self-attention and gathers the statistics;
the site itself stands after the residual add and calls the method's functions in order: guidance (MAG), importance,
threshold, selection, merging (DTP). docs/method.md has the mathematics.

Axis legend: B samples, N slots, N0 original tokens, C width of the stream, K alignment tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from madtp.attention import attention, attention_with_statistics, present_mask, valid_keys
from madtp.config import PruningConfig
from madtp.control import PruningControl
from madtp.guidance import pooled_features, query_projection
from madtp.importance import AttentionStatistics, ImportanceTerms, importance_terms
from madtp.merging import merge_weights, merged_position, merged_token
from madtp.selection import candidates_of, select, sorted_positions, survivor_order
from madtp.state import Quirks, TokenState, marked, slots_of, untouched
from madtp.threshold import straight_through_gate, threshold


@dataclass(frozen=True)
class SiteSpec:
    """What a site has to know, from the plan.

    name: unique name of the site. modality: of its stream. width: C. class_position: position of the class token,
    None if there is none or a graph value says it. protected: positions that are never pruned. causal: whether tokens
    see only earlier ones.
    """

    name: str
    modality: str
    width: int
    class_position: int | None
    protected: tuple[int, ...]
    causal: bool


class Seen(NamedTuple):
    """What the scoring attention saw: statistics, None while pruning is off, and which keys are not padding."""

    statistics: AttentionStatistics | None
    valid: Tensor | None


class ScoringAttention(nn.Module):
    """The self-attention of a block that is followed by a site."""

    def __init__(self, spec: SiteSpec, control: PruningControl) -> None:
        super().__init__()
        self.spec = spec
        self.control = control

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
        state: TokenState | None = None,
        readouts: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Seen]:
        """Attention as :func:`madtp.attention.attention`, and what the site needs of it.

        Args:
            state: of the stream, None at its first site.
            readouts: ``[B]`` original positions that the graph reads; the first stands in for the class token where
                there is none.
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
                query_state=state,
                key_state=state,
            )
            return output, Seen(None, None)
        present, still_causal = present_mask(query, key, mask, causal, state, state)
        batch, count = query.size(0), query.size(2)
        scored_padding = self.control.config.padding == "scored"
        valid = None if scored_padding else _valid(state, present, batch, key.size(2))
        positions = state if state is not None else untouched(batch, count)
        slot = self._class_slot(positions, readouts, batch, query.device)
        rows = torch.ones(batch, count, dtype=torch.bool, device=query.device) if valid is None else valid
        guarded = protected_readouts(readouts, self.control.config)
        rows = rows & ~protected_slots(self.spec, positions, guarded, batch, count, query.device)
        output, statistics = attention_with_statistics(
            query,
            key,
            value,
            present,
            dropout_p,
            still_causal,
            scale=scale,
            grouped=grouped,
            rows=rows,
            class_slot=slot,
        )
        return output, Seen(statistics, valid)

    def _class_slot(
        self, state: TokenState, readouts: tuple[Tensor, ...], batch: int, device: torch.device
    ) -> Tensor | None:
        position = self.spec.class_position
        if self.spec.causal and self.control.config.causal_class_row == "first":
            return torch.zeros(batch, dtype=torch.long, device=device)
        if self.spec.causal and readouts:
            return slots_of(state, readouts[0])
        if position is not None:
            return slots_of(state, torch.full((batch,), _from_start(position, state), device=device))
        return slots_of(state, readouts[0]) if readouts else None


class PruningSite(nn.Module):
    """Scores, keeps and merges the tokens of one block.

    Parameters: ``query``, the map d -> d_e in front of the alignment tokens (an identity where the widths agree).
    """

    def __init__(self, spec: SiteSpec, control: PruningControl, alignment_width: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.control = control
        self.alignment_width = alignment_width
        self.attention = ScoringAttention(spec, control)
        if control.config.alignment:
            self.query = query_projection(spec.width, alignment_width, seed=seed)

    def forward(
        self,
        tokens: Tensor,
        block_input: Tensor,
        seen: Seen,
        state: TokenState | None,
        readouts: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, TokenState]:
        """Prune.

        Args:
            tokens: ``[B, N, C]`` residual stream after the self-attention.
            block_input: ``[B, N, C]`` residual stream at the block's input.
            seen: from this site's ``attention``.
            state: of ``tokens``; None at the first site of a stream.
            readouts: ``[B]`` original positions that must survive.
        Returns:
            surviving tokens ``[B, N', C]`` and their state.
        """
        control, config = self.control, self.control.config
        batch, count, _ = tokens.shape
        before = state if state is not None else untouched(batch, count)
        if not control.active or seen.statistics is None:
            control.states[self.spec.name] = before
            return tokens, before
        device = tokens.device
        valid = torch.ones(batch, count, dtype=torch.bool, device=device) if seen.valid is None else seen.valid
        protected = protected_slots(self.spec, before, protected_readouts(readouts, config), batch, count, device)
        candidates = candidates_of(valid, protected, config)
        guidance = None
        if config.alignment and control.alignment is not None:
            queries = self.query(block_input)
            guidance = control.alignment(queries)
            if control.collects_features():
                control.features[self.spec.name] = pooled_features(queries, guidance, candidates)
        terms = importance_terms(seen.statistics, guidance, candidates, config, width=self.alignment_width)
        scores = terms.mean()
        limit = threshold(guidance, scores, candidates, max(control.temperature, 1e-6))
        kept = self._kept(terms, scores, limit, candidates, before)
        control.kept_counts[self.spec.name] = kept.sum(1)
        if config.straight_through and self.training:
            gate = straight_through_gate(scores, limit, control.gain, kept)
            tokens = tokens * torch.where(kept, gate, torch.ones_like(gate)).unsqueeze(-1).to(tokens.dtype)
        survivors = kept | protected
        if not config.merge:
            survivors = _never_nothing(survivors, scores, candidates)
        if bool(survivors.all()):
            control.states[self.spec.name] = before
            return tokens, before
        if control.in_place:
            pruned, after = tokens, marked(before, survivors)
        else:
            pruned, after = _assemble(tokens, before, survivors, candidates, valid, scores, self)
        control.states[self.spec.name] = after
        return pruned, after

    def _kept(
        self, terms: ImportanceTerms, scores: Tensor, limit: Tensor, candidates: Tensor, state: TokenState
    ) -> Tensor:
        control = self.control
        if control.forced is not None:
            wanted = control.forced[self.spec.name]
            if state.index is not None:
                wanted = wanted.gather(1, state.index)
                assert state.merged is not None
                wanted = wanted & ~state.merged
            return wanted & candidates
        counts = None
        if self.spec.name in control.static_counts:
            counts = torch.full((scores.size(0),), control.static_counts[self.spec.name], device=scores.device)
        return select(terms, scores, limit, candidates, control.config, gain=control.gain, counts=counts)


def _never_nothing(survivors: Tensor, scores: Tensor, candidates: Tensor) -> Tensor:
    """Each sample keeps its best token at least, even where the configuration asks for none."""
    best = scores.masked_fill(~candidates, float("-inf")).argmax(1, keepdim=True)
    lost = ~survivors.any(1, keepdim=True) & candidates.any(1, keepdim=True)
    return survivors.scatter(1, best, lost | survivors.gather(1, best))


def _valid(state: TokenState | None, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    if state is not None and state.index is not None:
        return state.valid
    return valid_keys(mask, batch, length)


def _from_start(position: int, state: TokenState) -> int:
    return position + state.full_length if position < 0 else position


def protected_readouts(readouts: tuple[Tensor, ...], config: PruningConfig) -> tuple[Tensor, ...]:
    """The computed positions that must survive: the authors' code protects none."""
    return readouts if config.readout == "remapped" else ()


def protected_slots(
    spec: SiteSpec, state: TokenState, readouts: tuple[Tensor, ...], batch: int, count: int, device: torch.device
) -> Tensor:
    """``[B, N]`` slots that hold protected tokens, be they text padding; slots that only fill up the batch hold none."""
    if state.index is None:
        index = torch.arange(count, device=device).expand(batch, count)
    else:
        index = state.index
    protected = torch.zeros(batch, count, dtype=torch.bool, device=device)
    for position in spec.protected:
        protected = protected | (index == _from_start(position, state))
    for positions in readouts:
        protected = protected | (index == positions[:, None].to(index.dtype))
    if state.valid is not None:
        protected = protected & state.valid
    return protected if state.merged is None else protected & ~state.merged


def _assemble(
    tokens: Tensor,
    state: TokenState,
    survivors: Tensor,
    candidates: Tensor,
    valid: Tensor,
    scores: Tensor,
    site: PruningSite,
) -> tuple[Tensor, TokenState]:
    """Survivors first, then the merged token, then padding slots; all fields move by the same indices."""
    config = site.control.config
    batch, count, _ = tokens.shape
    device = tokens.device
    dropped = candidates & ~survivors
    index = torch.arange(count, device=device).expand(batch, count) if state.index is None else state.index
    merged = torch.zeros_like(survivors) if state.merged is None else state.merged
    order = survivor_order(survivors, scores, candidates, config.order)
    counts = survivors.sum(1)
    totals = counts
    if config.merge:
        weights = merge_weights(scores, dropped)
        slot, seen = merged_position(scores, dropped, valid, config.merged_mask)
        if site.spec.causal and config.causal_mask == "gathered":
            stands_for = index.masked_fill(~dropped, -1).amax(1, keepdim=True).clamp(min=0)
        else:
            stands_for = index.gather(1, slot[:, None])
        totals = counts + seen.long()
        tokens = torch.cat([tokens, merged_token(tokens, weights).to(tokens.dtype)], 1)
        index = torch.cat([index, stands_for], 1)
        merged = torch.cat([merged, torch.ones_like(merged[:, :1])], 1)
    length = int(totals.max())
    slots = torch.arange(length, device=device).expand(batch, length)
    source = torch.nn.functional.pad(order, (0, 1), value=count)[:, :length]
    source = torch.where(slots < counts[:, None], source, torch.full_like(source, tokens.size(1) - 1))
    alive = slots < totals[:, None]
    after = TokenState(
        index=index.gather(1, source),
        valid=None if bool(alive.all()) else alive,
        merged=merged.gather(1, source),
        mask_index=_mask_index(state, dropped, candidates, scores, counts, site, length),
        full_length=state.full_length,
        length=length,
        batch=batch,
        quirks=Quirks(config.readout == "original", config.cross_mask == "ignored"),
    )
    return tokens.gather(1, source[:, :, None].expand(-1, -1, tokens.size(2))), after


def _mask_index(
    state: TokenState,
    dropped: Tensor,
    candidates: Tensor,
    scores: Tensor,
    counts: Tensor,
    site: PruningSite,
    length: int,
) -> Tensor | None:
    """The authors' reading of masks: cropped where causal, else by falling score while the tokens are not sorted
    (docs/deviations.md)."""
    config = site.control.config
    if site.spec.causal and config.causal_mask == "cropped":
        return torch.arange(length, device=scores.device).expand(state.batch, length)
    if config.mask_order == "tokens" or not bool(dropped.any()):
        return state.mask_index
    before = state.mask_index if state.mask_index is not None else state.index
    kept = int(counts.max()) - int((~candidates[0]).sum())
    positions = sorted_positions(scores, candidates, kept)
    return positions if before is None else before.gather(1, positions)
