"""Which tokens of a stream a site may drop: start at :func:`layout_of`.

Most streams begin with their class token and end with padding: there the candidates are a stretch of each sample's slots, and
arrays about them are cut instead of masked.

Axis legend: B samples, N slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.arrays import Flags, on_host
from madtp.method.selection import candidates_of
from madtp.sites.control import PruningControl
from madtp.sites.protection import Position, first_slots, protected_readouts, protected_slots, unpruned_slots
from madtp.sites.scoring import BlockAttention
from madtp.sites.spec import SiteSpec
from madtp.tokens.segments import SegmentMap, run_slots, segment_slots
from madtp.tokens.state import TokenState


@dataclass(frozen=True)
class CandidateGroup:
    """Candidates that are judged together: those of the whole stream, or those of one segment of it.

    Attributes:
        key: name in the records of a forward: the site's, or ``site[modality]`` for a segment.
        modality: "image" or "text".
        first: slot of the first token that may be a candidate; those before it are protected.
        inside: ``[B, N - first]`` bool, which of the tokens from there on are candidates; None if all are.
        is_tail: all tokens from there on are candidates but the padding behind them.
        images: ``[B, N - first]``, the number of the image of each token, -1 for none. None if a sample is an image, or if it
            does not matter.
    """

    key: str
    modality: str
    first: int
    inside: Tensor | None
    is_tail: bool = False
    images: Tensor | None = None

    def cut(self, values: Tensor) -> Tensor:
        """The part of values ``[B, N, ...]`` that belongs to the tokens from ``first`` on."""
        return values[:, self.first :] if self.first else values

    def on_host(self, state: TokenState) -> Flags | None:
        """``inside`` as an array."""
        if self.inside is None:
            return None
        if self.is_tail and state.rows is not None:
            tail: Flags = np.arange(self.first, state.length) < np.array(state.rows.lengths)[:, None]
            return tail
        return on_host(self.inside)

    def mask(self, state: TokenState, device: torch.device) -> Tensor:
        """Which of all tokens are candidates, ``[B, N]`` bool."""
        inside = self.inside
        if inside is None:
            inside = torch.ones(state.batch, state.length - self.first, dtype=torch.bool, device=device)
        return F.pad(inside, (self.first, 0)) if self.first else inside


@dataclass(frozen=True)
class Layout:
    """Which tokens of a stream may be dropped.

    Attributes:
        groups: the candidates.
        required: ``[B, N]`` bool, the tokens that survive in any case; None if they are the first slots of each sample.
        first: the number of these slots.
        valid: ``[B, N]`` bool, False on padding; None if no token is padding.
    """

    groups: Sequence[CandidateGroup]
    required: Tensor | None
    first: int
    valid: Tensor | None

    def required_on_host(self, state: TokenState) -> Flags:
        """A fresh array ``[B, N]`` of the tokens that survive in any case."""
        if self.required is not None:
            return on_host(self.required).copy()
        required = np.zeros((state.batch, state.length), dtype=bool)
        slots = np.arange(self.first)
        required[:, : self.first] = True if state.rows is None else slots < np.array(state.rows.lengths)[:, None]
        return required


def layout_of(
    spec: SiteSpec,
    control: PruningControl,
    attention: BlockAttention,
    state: TokenState,
    *,
    readouts: tuple[Position, ...],
    segments: SegmentMap | None,
    device: torch.device,
) -> Layout:
    """Return which tokens of a stream may be dropped.

    Args:
        spec: the spec of the site.
        control: of the model.
        attention: what the block's attention knows of padding and of protected tokens.
        state: the state of the tokens.
        readouts: original positions that the graph reads.
        segments: which token belongs to which segment; None if the stream has no segments.
        device: the device of the tokens.
    """
    config, valid, protected = control.config, attention.valid, attention.protected
    if isinstance(protected, int):
        plain = attention.statistics is not None and attention.statistics.received is not None
        if plain and not control.counts_are_fixed():
            inside = None if valid is None else valid[:, protected:]
            is_tail = state.rows is not None and valid is state.valid
            group = CandidateGroup(spec.name, spec.modality, protected, inside, is_tail)
            return Layout([group], None, protected, valid)
    present = state.valid
    if present is None:
        present = torch.ones(state.batch, state.length, dtype=torch.bool, device=device)
    if isinstance(protected, int):
        protected = first_slots(protected, present)
    elif protected is None:
        guarded = protected_readouts(readouts, config)
        protected = protected_slots(spec, state, guarded, segments, valid, device)
    candidates = candidates_of(present if valid is None else valid, protected, config)
    if state.valid is not None:  # where padding is scored, slots that hold no token are not
        candidates = candidates & state.valid
    if segments is None:
        return Layout([CandidateGroup(spec.name, spec.modality, 0, candidates)], protected, 0, valid)
    groups, unpruned = _segment_groups(spec, candidates, state, segments, config)
    return Layout(groups, protected | unpruned, 0, valid)


def _segment_groups(
    spec: SiteSpec, candidates: Tensor, state: TokenState, segments: SegmentMap, config: PruningConfig
) -> tuple[list[CandidateGroup], Tensor]:
    """The candidates of each segment that is pruned, and the tokens ``[B, N]`` of those that are not."""
    unpruned = torch.zeros_like(candidates)
    slots = segment_slots(segments, state)
    groups = []
    for number, segment in enumerate(spec.segments):
        inside = slots == number
        if segment.pruned:
            key = f"{spec.name}[{segment.modality}]"
            counted = config.min_tokens_per_image and segment.modality == "image"
            images = run_slots(segments, number, state) if counted else None
            groups.append(CandidateGroup(key, segment.modality, 0, candidates & inside, images=images))
        else:
            unpruned = unpruned | inside if state.valid is None else unpruned | (inside & state.valid)
    return groups, unpruned


def mean_beside(
    tokens: Tensor, spec: SiteSpec, state: TokenState, segments: SegmentMap | None, valid: Tensor | None
) -> Tensor | None:
    """Return the mean ``[B, C]`` of the tokens in segments that are not pruned, such as text beside image tokens.

    Args:
        tokens: ``[B, N, C]``.
        spec: the spec of the site.
        state: the state of the tokens.
        segments: which token belongs to which segment.
        valid: ``[B, N]`` bool, False on padding; None if no token is padding.

    Returns:
        None where there is no such segment.
    """
    if segments is None or all(segment.pruned for segment in spec.segments):
        return None
    others = unpruned_slots(spec, segments, state)
    others = others if valid is None else others & valid
    weights = others.to(tokens.dtype)
    return torch.bmm(weights.unsqueeze(1), tokens).squeeze(1) / weights.sum(1, keepdim=True).clamp(min=1)
