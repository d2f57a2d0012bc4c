"""A pruning site: the place in a rewritten graph where the tokens of one block are scored, kept, merged or dropped.

Start at :class:`PruningSite`. One of its children observes the block's self-attention (``scoring.py``): ``attention`` replaces
it, ``windows`` replaces it where it runs in windows of a grid, and ``map`` reads an attention map that the model computes in
its own way. The site itself stands behind the residual add of the self-attention (behind its norm in post-norm blocks). It
calls the functions of the method in order: guidance (MAG), importance, threshold, selection and merging (DTP).
``docs/method.md`` has the mathematics.

Axis legend: B samples, N slots, N' slots afterwards, N0 original tokens, C width of the stream, K alignment tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from madtp.method.guidance import pooled_features, query_projection
from madtp.method.importance import AttentionStatistics, ImportanceTerms, importance_terms
from madtp.method.selection import candidates_of, select
from madtp.method.threshold import straight_through_gate, threshold
from madtp.sites.control import FeatureKey, Observation, PruningControl
from madtp.sites.scoring import (
    BlockAttention,
    PackedScoringAttention,
    Position,
    ScoringAttention,
    ScoringMap,
    SiteSpec,
    protected_readouts,
    protected_slots,
)
from madtp.sites.window_attention import WindowAttention
from madtp.tokens.assembly import Decision, assemble
from madtp.tokens.packing import in_rows, in_slots
from madtp.tokens.segments import SegmentMap, segment_slots
from madtp.tokens.state import TokenState, hide_dropped, unpruned_state


@dataclass(frozen=True)
class CandidateGroup:
    """Candidates that are judged together: those of the whole stream, or those of one segment of it.

    Attributes:
        key: name in the records of a forward: the site's, or ``site[modality]`` for a segment.
        modality: "image" or "text".
        candidates: ``[B, N]`` bool.
    """

    key: str
    modality: str
    candidates: Tensor


@dataclass(frozen=True)
class _Judgement:
    """What a site decides about one group.

    Attributes:
        scores: importance S ``[B, N]``.
        kept: ``[B, N]`` bool, the survivors among its candidates.
        gate: ``[B, N]``, the factor that carries gradients to the threshold; None outside of training.
    """

    scores: Tensor
    kept: Tensor
    gate: Tensor | None


class PruningSite(nn.Module):
    """Scores, keeps and merges the tokens of one block.

    Args:
        spec: what the plan says about the site.
        control: shared by all sites of the model.
        alignment_width: d_e, the width of the alignment tokens.
        seed: seed of the weights of ``query``.

    Attributes:
        query: the map C -> d_e from the residual stream to the queries; absent without alignment tokens. See
            :func:`madtp.method.guidance.query_projection`.
        attention: replaces the block's self-attention.
        packed_attention: replaces it where its tokens are packed rows.
        windows: replaces it where it runs in windows of a grid.
        map: observes an attention map that keeps its own spelling.
    """

    def __init__(self, spec: SiteSpec, control: PruningControl, alignment_width: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.control = control
        self.attention = ScoringAttention(spec, control)
        self.packed_attention = PackedScoringAttention(spec, control)
        self.windows = WindowAttention(control)
        self.map = ScoringMap(spec, control)
        if control.config.alignment:
            always = control.config.query_projection == "always"
            self.query = query_projection(spec.width, alignment_width, seed=seed, always=always)

    def forward(
        self,
        tokens: Tensor,
        block_input: Tensor,
        attention: BlockAttention,
        state: TokenState | None,
        readouts: tuple[Position, ...] = (),
        segments: SegmentMap | None = None,
    ) -> tuple[Tensor, TokenState]:
        """Prune.

        Args:
            tokens: residual stream behind the self-attention: packed rows ``[1, T, C]``, or ``[B, N, C]`` while nothing was
                pruned.
            block_input: X, residual stream at the block's input, before its first norm, of the same shape.
            attention: what this site's ``attention``, ``windows`` or ``map`` observed.
            state: the state of ``tokens``; None at the first site of a stream.
            readouts: original positions that the graph reads, ``[B]`` or one for all samples; they survive.
            segments: which token belongs to which segment; None if the stream has no segments.

        Returns:
            The surviving tokens as packed rows ``[1, T', C]``, and their state; what it was given if nothing is pruned.
        """
        before = state if state is not None else unpruned_state(tokens.size(0), tokens.size(1))
        after, rows = before, tokens
        if self.control.active and attention.statistics is not None:
            rows, after = self._prune(
                tokens.flatten(0, 1), block_input.flatten(0, 1), attention, before, readouts, segments
            )
        self.control.record.states[self.spec.name] = after
        if after.index is None:  # while nothing was pruned, values keep the form that they have in the original
            return rows.view_as(tokens), after
        return rows.reshape(1, -1, tokens.size(2)), after

    def _prune(
        self,
        rows: Tensor,
        block_input: Tensor,
        attention: BlockAttention,
        before: TokenState,
        readouts: tuple[Position, ...],
        segments: SegmentMap | None,
    ) -> tuple[Tensor, TokenState]:
        """Prune rows ``[T, C]``; ``block_input`` has the same shape."""
        assert attention.statistics is not None
        config, device = self.control.config, rows.device
        valid, protected = attention.valid, attention.protected
        if protected is None:
            guarded = protected_readouts(readouts, config)
            protected = protected_slots(self.spec, before, guarded, segments, valid, device)
        if valid is None:
            valid = torch.ones(before.batch, before.length, dtype=torch.bool, device=device)
        candidates = candidates_of(valid, protected, config)
        groups, unpruned = self._groups(candidates, before, segments)
        scores, kept, rows = self._judge_all(groups, rows, block_input, attention.statistics, before)
        survivors = kept | protected if unpruned is None else kept | protected | unpruned
        if not config.merge:
            survivors = _never_nothing(survivors, scores, candidates)
        if self.control.in_place:
            return rows, before if bool(survivors.all()) else hide_dropped(before, survivors)
        decision = Decision(survivors, [group.candidates for group in groups], valid, scores)
        return assemble(rows, before, decision, config, causal=self.spec.causal)

    def _groups(
        self, candidates: Tensor, state: TokenState, segments: SegmentMap | None
    ) -> tuple[list[CandidateGroup], Tensor | None]:
        """The candidates that are judged together, and the tokens ``[B, N]`` of segments that are not pruned, if there are
        segments."""
        if segments is None:
            return [CandidateGroup(self.spec.name, self.spec.modality, candidates)], None
        unpruned = torch.zeros_like(candidates)
        slots = segment_slots(segments, state)
        groups = []
        for number, segment in enumerate(self.spec.segments):
            inside = slots == number
            if segment.pruned:
                key = f"{self.spec.name}[{segment.modality}]"
                groups.append(CandidateGroup(key, segment.modality, candidates & inside))
            else:
                unpruned = unpruned | inside if state.valid is None else unpruned | (inside & state.valid)
        return groups, unpruned

    def _judge_all(
        self,
        groups: Sequence[CandidateGroup],
        tokens: Tensor,
        block_input: Tensor,
        statistics: AttentionStatistics,
        state: TokenState,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Importance S ``[B, N]``, candidates ``[B, N]`` that survive, and the tokens ``[T, C]`` times the gates of all
        groups."""
        control = self.control
        guidance = None
        if control.config.alignment and control.alignment is not None:
            guidance = in_slots(control.alignment(block_input, self.query), state)
        kept: Tensor | None = None
        scores: Tensor | None = None
        for group in groups:
            if control.observer is not None:
                seen = Observation(group.key, self.query, block_input, tokens, group.candidates, state)
                control.observer(seen)
            judged = self._judge(group, block_input, statistics, guidance, state)
            scores = judged.scores if scores is None else torch.where(group.candidates, judged.scores, scores)
            kept = judged.kept if kept is None else kept | judged.kept
            if judged.gate is not None:
                tokens = tokens * in_rows(judged.gate, state).unsqueeze(-1).to(tokens.dtype)
        if scores is None or kept is None:  # no segment is pruned
            kept = torch.zeros(state.batch, state.length, dtype=torch.bool, device=tokens.device)
            scores = torch.zeros_like(kept, dtype=torch.float32)
        return scores, kept, tokens

    def _judge(
        self,
        group: CandidateGroup,
        block_input: Tensor,
        statistics: AttentionStatistics,
        guidance: Tensor | None,
        state: TokenState,
    ) -> _Judgement:
        control, config = self.control, self.control.config
        if guidance is not None and control.collects_features():
            features = pooled_features(in_slots(self.query(block_input), state), guidance, group.candidates)
            control.record.features[FeatureKey(self.spec.name, group.modality)] = features
        terms = importance_terms(statistics, guidance, group.candidates, config)
        scores = terms.mean()
        theta = threshold(guidance, scores, group.candidates, max(control.temperature, 1e-6))
        kept = self._kept(group, terms, scores, theta, state)
        control.record.kept_counts[group.key] = kept.sum(1)
        if not (config.straight_through and self.training):
            return _Judgement(scores, kept, None)
        gate = straight_through_gate(scores, theta, control.gain, kept)
        return _Judgement(scores, kept, torch.where(kept, gate, torch.ones_like(gate)))

    def _kept(
        self, group: CandidateGroup, terms: ImportanceTerms, scores: Tensor, theta: Tensor, state: TokenState
    ) -> Tensor:
        control = self.control
        if control.forced is not None:
            wanted = control.forced[self.spec.name]
            if state.index is not None:
                wanted = wanted.gather(1, state.index)
                assert state.merged is not None
                wanted = wanted & ~state.merged
            return wanted & group.candidates
        counts = None
        if group.key in control.static_counts:
            counts = torch.full((scores.size(0),), control.static_counts[group.key], device=scores.device)
        return select(terms, scores, theta, group.candidates, control.config, gain=control.gain, counts=counts)


def _never_nothing(survivors: Tensor, scores: Tensor, candidates: Tensor) -> Tensor:
    """Keep the best candidate of a sample that would otherwise lose all its tokens."""
    best = scores.masked_fill(~candidates, float("-inf")).argmax(1, keepdim=True)
    lost = ~survivors.any(1, keepdim=True) & candidates.any(1, keepdim=True)
    return survivors.scatter(1, best, lost | survivors.gather(1, best))
