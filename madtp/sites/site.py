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
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from madtp.calls.compiling import is_compiling
from madtp.errors import MadtpError
from madtp.method.guidance import pooled_features, query_projection
from madtp.method.importance import AttentionStatistics, ImportanceTerms, importance_terms
from madtp.method.selection import candidates_of, ranking, select, smallest_drop
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
from madtp.tokens.static_assembly import StaticDecision, StaticGroup, assemble_static, select_static


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
class _Scored:
    """One group with the importance of its tokens.

    Attributes:
        group: the candidates.
        terms: s1, s2 and s3.
        scores: importance S ``[B, N]``.
    """

    group: CandidateGroup
    terms: ImportanceTerms
    scores: Tensor


@dataclass(frozen=True)
class _Ballot:
    """What a site's groups are judged by.

    Attributes:
        scored: the groups.
        guidance: G ``[B, N, K]``; None without alignment tokens.
        scores: importance S ``[B, N]`` over all groups.
    """

    scored: Sequence[_Scored]
    guidance: Tensor | None
    scores: Tensor


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
        # A sample alone whose tokens are all padding has none left.
        if self.control.active and attention.statistics is not None and before.length > 0:
            rows, after = self._prune(
                tokens.flatten(0, 1), block_input.flatten(0, 1), attention, before, readouts, segments
            )
        if not is_compiling():
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
        required = protected if unpruned is None else protected | unpruned
        room = self.control.measured_room
        if room is not None:
            room[self.spec.name] = max(room.get(self.spec.name, 0), int(required.sum(1).max()))
        ballot = self._score_all(groups, rows, block_input, attention.statistics, before)
        if self.control.counts_are_fixed():
            whole = valid if attention.valid is not None or before.valid is not None else None
            varies = bool(readouts) or segments is not None
            return self._keep_counts(ballot, required, whole, rows, before, varies=varies)
        kept = torch.zeros_like(candidates)
        for one in ballot.scored:
            own, rows = self._keep_group(one, ballot.guidance, rows, before)
            kept = kept | own
        survivors = kept | required
        if not config.merge:
            survivors = _never_nothing(survivors, ballot.scores, candidates)
        if self.control.in_place:
            return rows, before if bool(survivors.all()) else hide_dropped(before, survivors)
        decision = Decision(survivors, [group.candidates for group in groups], valid, ballot.scores)
        return assemble(rows, before, decision, config, causal=self.spec.causal)

    def _keep_counts(
        self,
        ballot: _Ballot,
        required: Tensor,
        valid: Tensor | None,
        rows: Tensor,
        before: TokenState,
        *,
        varies: bool,
    ) -> tuple[Tensor, TokenState]:
        """Keep as many tokens of every sample as were fixed.

        Args:
            ballot: the groups.
            required: ``[B, N]`` bool, the tokens that survive in any case.
            valid: ``[B, N]`` bool; None if no slot is padding.
            rows: ``[T, C]`` along ``before``.
            before: the state before pruning.
            varies: whether the number of required tokens depends on the sample.
        """
        control, config = self.control, self.control.config
        for one in ballot.scored:
            if one.group.key not in control.static_counts:
                raise MadtpError(
                    f"{one.group.key} has no fixed count, because no batch that the model was frozen with has reached it; "
                    "freeze the model again, with batches that do."
                )
        groups = [
            StaticGroup(
                candidates=one.group.candidates,
                ranking=ranking(one.terms, one.scores, config).float(),
                count=control.static_counts[one.group.key],
            )
            for one in ballot.scored
        ]
        if self.spec.name not in control.static_room and not is_compiling():
            control.static_room[self.spec.name] = int(required.sum(1).max())
        room = control.static_room[self.spec.name]
        if not config.merge:  # a sample never loses all its tokens
            room = max(room, 1 - sum(group.count for group in groups))
        decision = StaticDecision(
            groups=groups, required=required, room=room, varies=varies, scores=ballot.scores, valid=valid
        )
        if decision.kept + smallest_drop(config) > before.length or not groups:
            self._note_counts(ballot, torch.ones_like(required))
            if valid is None or before.static:
                return rows, before
            return rows, replace(hide_dropped(before, valid | required), static=True)
        selection = select_static(decision)
        self._note_counts(ballot, selection.survivors)
        for one in ballot.scored if self._gates() else ():
            kept = selection.survivors & one.group.candidates
            rows = self._gated(one, self._theta(one, ballot.guidance), kept, rows, before)
        return assemble_static(rows, before, decision, selection, merge=config.merge, causal=self.spec.causal)

    def _note_counts(self, ballot: _Ballot, survivors: Tensor) -> None:
        if is_compiling():  # a compiler would have to return what is recorded
            return
        for one in ballot.scored:
            self.control.record.kept_counts[one.group.key] = (survivors & one.group.candidates).sum(1)

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

    def _score_all(
        self,
        groups: Sequence[CandidateGroup],
        tokens: Tensor,
        block_input: Tensor,
        statistics: AttentionStatistics,
        state: TokenState,
    ) -> _Ballot:
        """Score the candidates of all groups; ``tokens`` and ``block_input`` are rows ``[T, C]``."""
        control = self.control
        guidance = None
        if control.config.alignment and control.alignment is not None:
            guidance = in_slots(control.alignment(block_input, self.query), state)
        scored = []
        for group in groups:
            if control.observer is not None:
                seen = Observation(group.key, self.query, block_input, tokens, group.candidates, state)
                control.observer(seen)
            if guidance is not None and control.collects_features():
                features = pooled_features(in_slots(self.query(block_input), state), guidance, group.candidates)
                control.record.features[FeatureKey(self.spec.name, group.modality)] = features
            terms = importance_terms(statistics, guidance, group.candidates, control.config)
            scored.append(_Scored(group, terms, terms.mean()))
        if not scored:  # no segment is pruned
            scores = torch.zeros(state.batch, state.length, device=tokens.device)
            return _Ballot((), guidance, scores)
        scores = scored[0].scores
        for one in scored[1:]:
            scores = torch.where(one.group.candidates, one.scores, scores)
        return _Ballot(scored, guidance, scores)

    def _keep_group(
        self, scored: _Scored, guidance: Tensor | None, rows: Tensor, state: TokenState
    ) -> tuple[Tensor, Tensor]:
        """The candidates ``[B, N]`` of a group that survive, and the rows ``[T, C]`` times their gates."""
        control, group = self.control, scored.group
        theta = self._theta(scored, guidance)
        if control.forced is not None:
            kept = group.candidates & _forced_slots(control.forced[self.spec.name], state)
        else:
            kept = select(scored.terms, scored.scores, theta, group.candidates, control.config, gain=control.gain)
        control.record.kept_counts[group.key] = kept.sum(1)
        return kept, self._gated(scored, theta, kept, rows, state) if self._gates() else rows

    def _theta(self, scored: _Scored, guidance: Tensor | None) -> Tensor:
        return threshold(guidance, scored.scores, scored.group.candidates, max(self.control.temperature, 1e-6))

    def _gates(self) -> bool:
        """Whether gradients reach the threshold: in training with ``straight_through``."""
        return self.control.config.straight_through and self.training

    def _gated(self, scored: _Scored, theta: Tensor, kept: Tensor, rows: Tensor, state: TokenState) -> Tensor:
        """The rows times the factor that carries gradients to the threshold."""
        gate = straight_through_gate(scored.scores, theta, self.control.gain, kept)
        gate = torch.where(kept, gate, torch.ones_like(gate))
        return rows * in_rows(gate, state).unsqueeze(-1).to(rows.dtype)


def _forced_slots(wanted: Tensor, state: TokenState) -> Tensor:
    """Which slots ``[B, N]`` hold tokens that are ``wanted [B, N0]``; merged tokens are not."""
    if state.index is None:
        return wanted
    assert state.merged is not None
    return wanted.gather(1, state.index) & ~state.merged


def _never_nothing(survivors: Tensor, scores: Tensor, candidates: Tensor) -> Tensor:
    """Keep the best candidate of a sample that would otherwise lose all its tokens."""
    best = scores.masked_fill(~candidates, float("-inf")).argmax(1, keepdim=True)
    lost = ~survivors.any(1, keepdim=True) & candidates.any(1, keepdim=True)
    return survivors.scatter(1, best, lost | survivors.gather(1, best))
