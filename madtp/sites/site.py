"""A pruning site: the place in a rewritten graph where one block's tokens are scored, kept, merged or dropped.

Start at :class:`PruningSite`. Its ``attention`` child (``windows``, where it is in windows of a grid) replaces the block's
self-attention and gathers the statistics, or its ``map`` child reads them off a map that the model makes its own way
(``scoring.py``). The site itself stands after the
residual add and calls the method's functions in order: guidance (MAG), importance, threshold, selection, merging (DTP).
docs/method.md has the mathematics.

Axis legend: B samples, N slots, N0 original tokens, C width of the stream, K alignment tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from madtp.method.guidance import pooled_features, query_projection
from madtp.method.importance import AttentionStatistics, ImportanceTerms, importance_terms
from madtp.method.selection import candidates_of, select
from madtp.method.threshold import straight_through_gate, threshold
from madtp.sites.control import Observation, PruningControl
from madtp.sites.scoring import (
    Position,
    ScoringAttention,
    ScoringMap,
    Seen,
    SiteSpec,
    protected_readouts,
    protected_slots,
)
from madtp.sites.window_attention import WindowAttention
from madtp.tokens.assembly import assemble
from madtp.tokens.segments import SegmentMap, segment_slots
from madtp.tokens.state import TokenState, marked, untouched


@dataclass(frozen=True)
class Part:
    """The tokens that are judged together: all of a stream, or those of one segment.

    key: name in the records of a forward, the site's or ``site[modality]``. candidates: ``[B, N]``.
    """

    key: str
    modality: str
    candidates: Tensor


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
        self.windows = WindowAttention(control)
        self.map = ScoringMap(spec, control)
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
            seen: from this site's ``attention``, ``windows`` or ``map``.
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
        protected = protected_slots(self.spec, before, protected_readouts(readouts, config), segments, valid)
        candidates = candidates_of(valid, protected, config)
        parts, others = self._parts(candidates, protected, before, segments)
        guidance = None
        if config.alignment and control.alignment is not None:
            guidance = control.alignment(block_input, self.query)
        kept, scores = torch.zeros_like(candidates), torch.zeros_like(candidates, dtype=torch.float32)
        for part in parts:
            if control.observer is not None:
                control.observer(Observation(part.key, self.query, block_input, tokens, part.candidates))
            own_scores, own_kept, gate = self._judge(part, seen.statistics, block_input, guidance, before)
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
        block_input: Tensor,
        guidance: Tensor | None,
        state: TokenState,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Importance ``[B, N]``, survivors ``[B, N]`` among the candidates, and in training the gate ``[B, N]`` that carries
        gradients to the threshold."""
        control, config = self.control, self.control.config
        if guidance is not None and control.collects_features():
            features = pooled_features(self.query(block_input), guidance, part.candidates)
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
