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

from madtp.assembly import assemble
from madtp.attention import attention, attention_with_statistics, mask_of_survivors, valid_keys
from madtp.config import PruningConfig
from madtp.control import Observation, PruningControl
from madtp.guidance import pooled_features, query_projection
from madtp.importance import AttentionStatistics, ImportanceTerms, importance_terms
from madtp.segments import SegmentMap, segment_slots, special_slots
from madtp.selection import candidates_of, select
from madtp.state import TokenState, marked, slots_of, untouched
from madtp.threshold import straight_through_gate, threshold


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
    see only earlier ones. segments: of a stream that several modalities share, in the order of their numbers.
    """

    name: str
    modality: str
    width: int
    class_position: int | None
    protected: tuple[int, ...]
    causal: bool
    segments: tuple[SegmentSpec, ...] = ()


@dataclass(frozen=True)
class Part:
    """The tokens that are judged together: all of a stream, or those of one segment.

    key: name in the records of a forward, the site's or ``site[modality]``. candidates: ``[B, N]``.
    """

    key: str
    modality: str
    candidates: Tensor


Position = Tensor | int


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
        softcap: float | None = None,
        present_mask: Tensor | None = None,
        state: TokenState | None = None,
        readouts: tuple[Position, ...] = (),
        segments: SegmentMap | None = None,
    ) -> tuple[Tensor, Seen]:
        """Attention as :func:`madtp.attention.attention`, and what the site needs of it.

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
        scored_padding = self.control.config.padding == "scored"
        valid = None if scored_padding else self._valid(state, present, batch, key.size(2))
        positions = state if state is not None else untouched(batch, count)
        slot = self._class_slot(positions, readouts, batch, query.device, segments)
        rows = torch.ones(batch, count, dtype=torch.bool, device=query.device) if valid is None else valid
        guarded = protected_readouts(readouts, self.control.config)
        rows = rows & ~protected_slots(self.spec, positions, guarded, segments, query.device)
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

    def _valid(self, state: TokenState | None, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
        if state is None or state.index is None:
            return valid_keys(mask, batch, length)
        if all(segment.pruned for segment in self.spec.segments):
            return state.valid
        # Padding stays in a segment that is left alone, so the mask has to tell it at every site.
        shown = valid_keys(mask, batch, length)
        return shown if state.valid is None else state.valid if shown is None else state.valid & shown

    def _class_slot(
        self,
        state: TokenState,
        readouts: tuple[Position, ...],
        batch: int,
        device: torch.device,
        segments: SegmentMap | None = None,
    ) -> Tensor | None:
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
        return None


class PruningSite(nn.Module):
    """Scores, keeps and merges the tokens of one block.

    Parameters: ``query``, the map d -> d_e in front of the alignment tokens (an identity where the widths agree, unless the
    configuration wants it always).
    """

    def __init__(self, spec: SiteSpec, control: PruningControl, alignment_width: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.control = control
        self.attention = ScoringAttention(spec, control)
        if control.config.alignment:
            always = control.config.query_projection == "always"
            self.query = query_projection(spec.width, alignment_width, seed=seed, always=always)

    def forward(
        self,
        tokens: Tensor,
        block_input: Tensor,
        seen: Seen,
        state: TokenState | None,
        readouts: tuple[Position, ...] = (),
        segments: SegmentMap | None = None,
    ) -> tuple[Tensor, TokenState]:
        """Prune.

        Args:
            tokens: ``[B, N, C]`` residual stream after the self-attention.
            block_input: ``[B, N, C]`` residual stream at the block's input.
            seen: from this site's ``attention``.
            state: of ``tokens``; None at the first site of a stream.
            readouts: original positions that must survive, ``[B]`` or one for all.
            segments: which token is of which segment; None where all are of one.
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
        protected = protected_slots(self.spec, before, protected_readouts(readouts, config), segments, device)
        candidates = candidates_of(valid, protected, config)
        parts, others = self._parts(candidates, protected, before, segments)
        queries, guidance = None, None
        if config.alignment and control.alignment is not None:
            queries = self.query(block_input)
            guidance = control.alignment(queries)
        kept, scores = torch.zeros_like(candidates), torch.zeros_like(seen.statistics.received)
        for part in parts:
            if control.observer is not None:
                control.observer(Observation(part.key, self.query, block_input, tokens, part.candidates))
            own_scores, own_kept, gate = self._judge(part, seen.statistics, queries, guidance, before)
            scores = own_scores if len(parts) == 1 else torch.where(part.candidates, own_scores, scores)
            kept = kept | own_kept
            if gate is not None:
                tokens = tokens * gate.unsqueeze(-1).to(tokens.dtype)
        survivors = kept | protected | others
        if not config.merge:
            survivors = _never_nothing(survivors, scores, candidates)
        if bool(survivors.all()):
            control.states[self.spec.name] = before
            return tokens, before
        if control.in_place:
            pruned, after = tokens, marked(before, survivors)
        else:
            groups = [part.candidates for part in parts]
            pruned, after = assemble(tokens, before, survivors, groups, valid, scores, config, causal=self.spec.causal)
        control.states[self.spec.name] = after
        return pruned, after

    def _parts(
        self, candidates: Tensor, protected: Tensor, state: TokenState, segments: SegmentMap | None
    ) -> tuple[list[Part], Tensor]:
        """What is judged together, and the tokens ``[B, N]`` of segments that are left alone."""
        others = torch.zeros_like(candidates)
        if segments is None:
            return [Part(self.spec.name, self.spec.modality, candidates)], others
        slots = segment_slots(segments, state)
        parts = []
        for number, segment in enumerate(self.spec.segments):
            inside = slots == number
            if segment.pruned:
                parts.append(Part(f"{self.spec.name}[{segment.modality}]", segment.modality, candidates & inside))
            else:
                others = others | inside if state.valid is None else others | (inside & state.valid)
        return parts, others

    def _judge(
        self,
        part: Part,
        statistics: AttentionStatistics,
        queries: Tensor | None,
        guidance: Tensor | None,
        state: TokenState,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Importance ``[B, N]``, survivors ``[B, N]`` among the candidates, and in training the gate ``[B, N]`` that carries
        gradients to the threshold."""
        control, config = self.control, self.control.config
        if queries is not None and guidance is not None and control.collects_features():
            features = pooled_features(queries, guidance, part.candidates)
            control.features[self.spec.name, part.modality] = features
        terms = importance_terms(statistics, guidance, part.candidates, config)
        scores = terms.mean()
        limit = threshold(guidance, scores, part.candidates, max(control.temperature, 1e-6))
        kept = self._kept(part, terms, scores, limit, state)
        control.kept_counts[part.key] = kept.sum(1)
        if not (config.straight_through and self.training):
            return scores, kept, None
        gate = straight_through_gate(scores, limit, control.gain, kept)
        return scores, kept, torch.where(kept, gate, torch.ones_like(gate))

    def _kept(self, part: Part, terms: ImportanceTerms, scores: Tensor, limit: Tensor, state: TokenState) -> Tensor:
        control = self.control
        if control.forced is not None:
            wanted = control.forced[self.spec.name]
            if state.index is not None:
                wanted = wanted.gather(1, state.index)
                assert state.merged is not None
                wanted = wanted & ~state.merged
            return wanted & part.candidates
        counts = None
        if part.key in control.static_counts:
            counts = torch.full((scores.size(0),), control.static_counts[part.key], device=scores.device)
        return select(terms, scores, limit, part.candidates, control.config, gain=control.gain, counts=counts)


def _never_nothing(survivors: Tensor, scores: Tensor, candidates: Tensor) -> Tensor:
    """Each sample keeps its best token at least, even where the configuration asks for none."""
    best = scores.masked_fill(~candidates, float("-inf")).argmax(1, keepdim=True)
    lost = ~survivors.any(1, keepdim=True) & candidates.any(1, keepdim=True)
    return survivors.scatter(1, best, lost | survivors.gather(1, best))


def _from_start(position: int, state: TokenState) -> int:
    return position + state.full_length if position < 0 else position


def protected_readouts(readouts: tuple[Position, ...], config: PruningConfig) -> tuple[Position, ...]:
    """The computed positions that must survive: the authors' code protects none."""
    return readouts if config.readout == "remapped" else ()


def protected_slots(
    spec: SiteSpec,
    state: TokenState,
    readouts: tuple[Position, ...],
    segments: SegmentMap | None,
    device: torch.device,
) -> Tensor:
    """``[B, N]`` slots that hold protected tokens, be they text padding; slots that only fill up the batch hold none."""
    index = state.index
    if index is None:
        index = torch.arange(state.length, device=device).expand(state.batch, state.length)
    protected = torch.zeros_like(index, dtype=torch.bool)
    if segments is not None:
        protected = special_slots(segments, [segment.protected for segment in spec.segments], state)
    for position in spec.protected:
        protected = protected | (index == _from_start(position, state))
    for positions in readouts:
        wanted = positions[:, None].to(index.dtype) if isinstance(positions, Tensor) else positions
        protected = protected | (index == wanted)
    if state.valid is not None:
        protected = protected & state.valid
    return protected if state.merged is None else protected & ~state.merged
