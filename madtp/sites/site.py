"""A pruning site: the place in a rewritten graph where the tokens of one block are scored, kept, merged or dropped.

Start at :class:`PruningSite`. One of its children observes the block's self-attention (``scoring.py``): ``attention`` replaces
it, ``windows`` replaces it where it runs in windows of a grid, and ``map`` reads an attention map that the model computes in
its own way. The site itself stands behind the residual add of the self-attention (behind its norm in post-norm blocks). It
runs the parts of the method in order: guidance (MAG), scorer, threshold, selector and reducer (DTP).
``docs/method.md`` has the mathematics.

Axis legend: B samples, N slots, N' slots afterwards, N0 original tokens, C width of the stream, K alignment tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.calls.compiling import is_compiling
from madtp.errors import ConfigError, MadtpError
from madtp.method.arrays import Flags, on_host
from madtp.method.guidance import pooled_features, query_projection
from madtp.method.importance import AttentionStatistics, ImportanceTerms, best_of, importance_terms
from madtp.method.scorers import Evidence, Features, Scorer
from madtp.method.selectors import Ballot, keep_of_each_image
from madtp.method.threshold import straight_through_gate, threshold
from madtp.sites.candidates import CandidateGroup, Layout, layout_of, mean_beside
from madtp.sites.control import Observation, PruningControl
from madtp.sites.forward_record import FeatureKey
from madtp.sites.protection import Position
from madtp.sites.scoring import BlockAttention, PackedScoringAttention, ScoringAttention, ScoringMap
from madtp.sites.spec import SiteSpec
from madtp.sites.stream_start import StreamStart
from madtp.sites.window_attention import WindowAttention
from madtp.tokens.assembly import Decision, JudgedGroup, assemble
from madtp.tokens.packing import in_rows, in_slots
from madtp.tokens.segments import SegmentMap
from madtp.tokens.state import TokenState, hide_dropped, unpruned_state
from madtp.tokens.static_assembly import StaticDecision, StaticGroup, assemble_static, select_static


@dataclass(frozen=True)
class _Scored:
    """One group with what its tokens are judged by.

    Attributes:
        group: the candidates.
        guidance: G ``[B, N - first, K]``; None without alignment tokens, or where nothing asks for it.
        importance: S ``[B, N - first]``.
        ranking: ``[B, N - first]``, what the scorer says; S itself where that is the method's.
    """

    group: CandidateGroup
    guidance: Tensor | None
    importance: Tensor
    ranking: Tensor


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
        start: leaves out, at the input of the block, what a vision tower has dropped.
    """

    def __init__(self, spec: SiteSpec, control: PruningControl, alignment_width: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.control = control
        self.attention = ScoringAttention(spec, control)
        self.packed_attention = PackedScoringAttention(spec, control)
        self.windows = WindowAttention(control)
        self.map = ScoringMap(spec, control)
        self.start = StreamStart(spec, control)
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
            if after is not before and attention.protected is not None:
                after = replace(after, padding_known=True)
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
        control, parts = self.control, self.control.parts
        layout = layout_of(
            self.spec, control, attention, before, readouts=readouts, segments=segments, device=rows.device
        )
        self._note_room(layout, before)
        statistics = attention.statistics
        assert statistics is not None
        if parts.scorer.leaves_to_towers and self.spec.segments and statistics.class_attention is None:
            return rows, before
        scored = self._score(layout, rows, block_input, statistics, before, segments)
        if control.counts_are_fixed():
            varies = bool(readouts) or segments is not None
            return self._keep_counts(scored, layout, rows, before, varies=varies)
        survivors = layout.required_on_host(before)
        groups = []
        for one in scored:
            theta = self._theta(one) if parts.selector.needs.importance or self._gates() else None
            judged = self._ballot(one, theta, before)
            groups.append(JudgedGroup(one.group.first, judged.candidates, one.importance, judged.importance))
            kept = self._keep(one.group, judged, before)
            survivors[:, one.group.first :] |= kept
            if theta is not None and self._gates():
                rows = self._gated(one, theta, torch.from_numpy(kept).to(rows.device), rows, before)
        if not parts.reducer.merges:
            _never_nothing(survivors, groups)
        if control.in_place:
            if survivors.all():
                return rows, before
            return rows, hide_dropped(before, torch.from_numpy(survivors).to(rows.device))
        return assemble(
            rows,
            before,
            Decision(survivors, groups, merges=parts.reducer.merges),
            control.config,
            causal=self.spec.causal,
        )

    def _note_room(self, layout: Layout, state: TokenState) -> None:
        room = self.control.measured_room
        if room is not None:
            most = layout.first if layout.required is None else int(layout.required.sum(1).max())
            room[self.spec.name] = max(room.get(self.spec.name, 0), most)

    def _score(
        self,
        layout: Layout,
        tokens: Tensor,
        block_input: Tensor,
        statistics: AttentionStatistics[Tensor],
        state: TokenState,
        segments: SegmentMap | None,
    ) -> list[_Scored]:
        """Score the candidates of all groups; ``tokens`` and ``block_input`` are rows ``[T, C]``."""
        control = self.control
        guidance = None
        if control.guided:
            assert control.alignment is not None
            guidance = control.alignment(block_input, self.query)
            # No alignment token likes padding.
            guidance = in_slots(guidance, state, fill=torch.finfo(guidance.dtype).min)
        scored = []
        for group in layout.groups:
            if control.observer is not None:
                candidates = group.mask(state, tokens.device)
                control.observer(Observation(group.key, self.query, block_input, tokens, candidates, state))
            own = None if guidance is None else group.cut(guidance)
            if own is not None and control.collects_features():
                queries = group.cut(in_slots(self.query(block_input), state))
                features = pooled_features(queries, own, group.inside)
                control.record.features[FeatureKey(self.spec.name, group.modality)] = features
            received, seen = statistics.received, statistics.class_attention
            own_statistics = AttentionStatistics(
                None if received is None else group.cut(received), None if seen is None else group.cut(seen)
            )
            own_features: Features | None = None
            if control.parts.needs.features:
                slots = in_slots(block_input, state)
                context = mean_beside(slots, self.spec, state, segments, layout.valid)
                own_features = Features(group.cut(slots), group.inside, context)
            scored.append(_Scored(group, own, *self._judge(own_statistics, own, group.inside, own_features)))
        return scored

    def _judge(
        self,
        statistics: AttentionStatistics[Tensor],
        guidance: Tensor | None,
        candidates: Tensor | None,
        features: Features | None,
    ) -> tuple[Tensor, Tensor]:
        """The importance of the candidates of a group, and what they are ranked by."""
        config, scorer = self.control.config, self.control.parts.scorer
        best = None if guidance is None else best_of(guidance)
        given = [one for one in (statistics.received, statistics.class_attention, best) if one is not None]
        if features is not None and not given:
            none = features.tokens.new_zeros(features.tokens.shape[:2], dtype=torch.float32)
            evidence = Evidence(ImportanceTerms(None, None, None), none, features)
            return none, _checked(scorer.score(evidence, config), none, scorer)
        if not given or is_compiling() or any(one.device.type != "cpu" or one.requires_grad for one in given):
            terms = importance_terms(statistics, best, candidates, config)
            importance = terms.mean()
            return importance, _checked(scorer.score(Evidence(terms, importance, features), config), importance, scorer)
        known = [
            None if one is None else on_host(one)
            for one in (statistics.received, statistics.class_attention, best, candidates)
        ]
        with np.errstate(all="ignore"):  # as with tensors, the result tells of infinite numbers
            on_arrays = importance_terms(AttentionStatistics(known[0], known[1]), known[2], known[3], config)
            scores = on_arrays.mean()
            ranking = scorer.score(Evidence(on_arrays, scores, features), config)
        found = torch.from_numpy(scores)
        return found, found if ranking is scores else _checked(torch.as_tensor(ranking), found, scorer)

    def _ballot(self, scored: _Scored, theta: Tensor | None, state: TokenState) -> Ballot:
        """What is judged, on the host."""
        importance, ranking = scored.importance, scored.ranking
        if importance.device.type != "cpu":  # the host waits once
            columns = [importance, ranking] if theta is None else [importance, ranking, theta.unsqueeze(1)]
            values = torch.from_numpy(on_host(torch.cat(columns, 1)))
            importance, ranking, *rest = values.split([importance.size(1)] * 2 + [1] * (theta is not None), 1)
            theta = rest[0].squeeze(1) if rest else None
        scores = on_host(importance)
        return Ballot(
            importance=scores,
            ranking=scores if ranking is importance else on_host(ranking),
            theta=None if theta is None else on_host(theta),
            gain=float(self.control.gain),
            candidates=scored.group.on_host(state),
            smallest_drop=self.control.parts.reducer.smallest_drop,
        )

    def _keep(self, group: CandidateGroup, ballot: Ballot, state: TokenState) -> Flags:
        """Which candidates ``[B, N - first]`` of a group survive."""
        control = self.control
        if control.forced is not None:
            wanted = on_host(group.cut(_forced_slots(control.forced[self.spec.name], state)))
            kept = wanted if ballot.candidates is None else ballot.candidates & wanted
        else:
            kept = control.parts.selector.keep(ballot, control.config)
            least = control.config.min_tokens_per_image
            if least and group.modality == "image":
                images = None if group.images is None else on_host(group.images)
                keep_of_each_image(kept, ballot, images, least)
        control.record.kept_counts[group.key] = torch.from_numpy(kept.sum(1))
        return kept

    def _keep_counts(
        self, scored: Sequence[_Scored], layout: Layout, rows: Tensor, before: TokenState, *, varies: bool
    ) -> tuple[Tensor, TokenState]:
        """Keep as many tokens of every sample as were fixed.

        Args:
            scored: the groups, whose masks are over all tokens.
            layout: which tokens survive in any case.
            rows: ``[T, C]`` along ``before``.
            before: the state before pruning.
            varies: whether the number of required tokens depends on the sample.
        """
        control, parts, required = self.control, self.control.parts, layout.required
        assert required is not None
        valid = layout.valid if layout.valid is not None or before.valid is None else torch.ones_like(required)
        groups = []
        for one in scored:
            if one.group.key not in control.static_counts:
                raise MadtpError(
                    f"{one.group.key} has no fixed count, because no batch that the model was frozen with has reached it; "
                    "freeze the model again, with batches that do."
                )
            assert one.group.inside is not None
            count = control.static_counts[one.group.key]
            groups.append(StaticGroup(candidates=one.group.inside, ranking=one.ranking.float(), count=count))
        if self.spec.name not in control.static_room and not is_compiling():
            control.static_room[self.spec.name] = int(required.sum(1).max())
        room = control.static_room[self.spec.name]
        if not parts.reducer.merges:  # a sample never loses all its tokens
            room = max(room, 1 - sum(group.count for group in groups))
        importance = torch.zeros(required.shape, device=rows.device)
        for number, one in enumerate(scored):
            assert one.group.inside is not None
            importance = torch.where(one.group.inside, one.importance, importance) if number else one.importance
        decision = StaticDecision(
            groups=groups, required=required, room=room, varies=varies, scores=importance, valid=valid
        )
        if decision.kept + parts.reducer.smallest_drop > before.length or not groups:
            self._note_counts(scored, torch.ones_like(required))
            if valid is None or before.static:
                return rows, before
            return rows, replace(hide_dropped(before, valid | required), static=True)
        selection = select_static(decision)
        self._note_counts(scored, selection.survivors)
        for one in scored if self._gates() else ():
            assert one.group.inside is not None
            kept = selection.survivors & one.group.inside
            rows = self._gated(one, self._theta(one), kept, rows, before)
        return assemble_static(rows, before, decision, selection, merge=parts.reducer.merges, causal=self.spec.causal)

    def _note_counts(self, scored: Sequence[_Scored], survivors: Tensor) -> None:
        if is_compiling():  # a compiler would have to return what is recorded
            return
        for one in scored:
            assert one.group.inside is not None
            self.control.record.kept_counts[one.group.key] = (survivors & one.group.inside).sum(1)

    def _theta(self, scored: _Scored) -> Tensor:
        # Padding behind the tokens of a sample has neither importance nor guidance, but takes part in a mean.
        candidates = None if scored.group.is_tail and scored.guidance is not None else scored.group.inside
        return threshold(scored.guidance, scored.importance, candidates, max(self.control.temperature, 1e-6))

    def _gates(self) -> bool:
        """Whether gradients reach the threshold: in training with ``straight_through``."""
        return self.control.config.straight_through and self.training

    def _gated(self, scored: _Scored, theta: Tensor, kept: Tensor, rows: Tensor, state: TokenState) -> Tensor:
        """The rows times the factor that carries gradients to the threshold."""
        gate = straight_through_gate(scored.importance, theta, self.control.gain, kept)
        gate = F.pad(torch.where(kept, gate, torch.ones_like(gate)), (scored.group.first, 0), value=1.0)
        return rows * in_rows(gate, state).unsqueeze(-1).to(rows.dtype)


def _checked(ranking: Tensor, importance: Tensor, scorer: Scorer) -> Tensor:
    """A ranking ``[B, N]``, which somebody else's scorer may have returned in another shape."""
    if ranking.shape != importance.shape:
        raise ConfigError(
            f"the scorer {scorer.name!r} returned scores {list(ranking.shape)} for tokens {list(importance.shape)}; return one "
            "score for each token, [B, N]"
        )
    return ranking.float()


def _forced_slots(wanted: Tensor, state: TokenState) -> Tensor:
    """Which slots ``[B, N]`` hold tokens that are ``wanted [B, N0]``; merged tokens are not."""
    if state.index is None:
        return wanted
    assert state.merged is not None
    return wanted.gather(1, state.index) & ~state.merged


def _never_nothing(survivors: Flags, groups: Sequence[JudgedGroup]) -> None:
    """Keep the best candidate of a sample that would otherwise lose all its tokens."""
    for sample in np.flatnonzero(~survivors.any(1)):
        best, place = -np.inf, None
        for group in groups:
            dropped = group.dropped(survivors)[sample]
            if dropped.any():
                scores = np.where(dropped, group.scores[sample], -np.inf)
                if place is None or scores.max() > best:
                    best, place = scores.max(), group.first + int(scores.argmax())
        if place is not None:
            survivors[sample, place] = True
