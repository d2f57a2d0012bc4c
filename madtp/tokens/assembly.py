"""Assembly of a pruned stream: survivors and merged tokens as packed rows, and the state that says what they are.

Start at :func:`assemble`. The decision lies on the host, which has to know how long the result is. It works out where every
token goes; the tokens themselves are touched once, by one operation that gathers and merges.

Axis legend: B samples, T rows of all samples, N slots of a sample, K survivors of all samples, M merged tokens of all samples,
D dropped tokens, G groups of which each gets its own merged token, C width; T', N' the same afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from madtp.config import PruningConfig
from madtp.method.arrays import Flags, Numbers, on_host
from madtp.method.merging import merge_weights
from madtp.method.selection import sorted_positions, survivor_order
from madtp.tokens.attention import joined
from madtp.tokens.host_tokens import HostTokens
from madtp.tokens.packed_rows import packed_rows, padding_before
from madtp.tokens.packing import lengths_of
from madtp.tokens.state import Quirks, TokenState


@dataclass(frozen=True)
class JudgedGroup:
    """Candidates that were judged together.

    Attributes:
        first: slot of the first token that may be a candidate.
        candidates: ``[B, N - first]``; None if all of these tokens are candidates.
        importance: S ``[B, N - first]``.
        scores: S on the host.
    """

    first: int
    candidates: Flags | None
    importance: Tensor
    scores: Numbers

    def dropped(self, survivors: Flags) -> Flags:
        """The candidates ``[B, N - first]`` that are not among ``survivors [B, N]``."""
        dropped = ~survivors[:, self.first :]
        return dropped if self.candidates is None else self.candidates & dropped


@dataclass(frozen=True)
class Decision:
    """What a site has decided about the N tokens of each sample.

    Attributes:
        survivors: ``[B, N]``, protected tokens included.
        groups: what was judged.
        merges: whether the dropped tokens of a group become one token.
    """

    survivors: Flags
    groups: Sequence[JudgedGroup]
    merges: bool


def assemble(
    tokens: Tensor, state: TokenState, decision: Decision, config: PruningConfig, *, causal: bool
) -> tuple[Tensor, TokenState]:
    """Put together the pruned stream: of each sample the survivors, then one merged token per group.

    Args:
        tokens: rows ``[T, C]`` along ``state``.
        state: before pruning.
        decision: which of the tokens survive.
        config: the fields ``order`` and those of the official rules for masks and readouts are read.
        causal: tokens see only earlier ones.

    Returns:
        rows ``[T', C]`` and their state. Nothing changes where nothing is dropped.
    """
    survivors, lengths = decision.survivors, lengths_of(state)
    counts = survivors.sum(1)
    if counts.tolist() == list(lengths):
        return tokens, state
    skipped = padding_before(np.array(lengths, dtype=np.int64), state.length)
    before, was_merged = _tokens_on_host(state)
    last = causal and config.causal_mask == "gathered"
    merged = _merged(decision, before, skipped, last=last) if decision.merges else None
    moves = _moves(survivors, counts, _in_order(decision, config, counts), merged, skipped)
    after = TokenState(
        mask_index=_mask_index(state, decision, config, causal=causal, length=moves.slots),
        full_length=state.full_length,
        length=moves.slots,
        batch=state.batch,
        quirks=quirks_of(config),
        rows=packed_rows(moves.lengths.tolist(), moves.slots, tokens.device),
        **_tokens_of(before, was_merged, moves, merged, tokens.device),
    )
    return _gathered(tokens, moves, merged), after


def _tokens_on_host(state: TokenState) -> tuple[Numbers, Flags]:
    """The original position of the token in each slot, and which slots hold merged tokens, both ``[B, N]``."""
    if state.index is None:
        index: Numbers = np.arange(state.length)[None].repeat(state.batch, 0)
        return index, np.zeros(index.shape, dtype=bool)
    if state.host is not None and state.host.of is state.index:
        return state.host.index, state.host.merged
    index = on_host(state.index)
    return index, np.zeros(index.shape, dtype=bool) if state.merged is None else on_host(state.merged)


@dataclass(frozen=True)
class _Merged:
    """What becomes merged tokens; the order is that of samples, and of groups within a sample.

    Attributes:
        exist: ``[B, G]``, whether a sample drops tokens of a group.
        sizes: ``[M]`` number of tokens that each merged token is made of.
        positions: ``[M]`` original positions that they stand for.
        rows: ``[D]`` rows of the dropped tokens.
        weights: ``[D]`` their weights.
    """

    exist: Flags
    sizes: Numbers
    positions: Numbers
    rows: Numbers
    weights: Tensor


def _merged(decision: Decision, before: Numbers, skipped: Numbers, *, last: bool) -> _Merged | None:
    """The merged tokens, if there are any.

    Args:
        decision: which tokens are dropped.
        before: original positions ``[B, N]``.
        skipped: ``[B]`` padding slots of the samples before each.
        last: a merged token sees what its last member sees, and no earlier token sees it; elsewhere it stands for its most
            important member.
    """
    groups = [(group, group.dropped(decision.survivors)) for group in decision.groups]
    groups = [(group, own) for group, own in groups if own.any()]
    if not groups:
        return None
    samples, slots, positions, weights = [], [], [], []
    for group, own in groups:
        scores, places = group.scores, before[:, group.first :]
        sample, slot = own.nonzero()
        samples.append(sample)
        slots.append(slot + group.first)
        if last:
            positions.append(np.where(own, places, 0).max(1, initial=0))
        else:
            best = np.where(own, scores, -np.inf).argmax(1)
            positions.append(places[np.arange(len(best)), best])
        if group.importance.requires_grad:
            device = group.importance.device
            weight = merge_weights(group.importance.float(), torch.from_numpy(own).to(device)).flatten()
            weights.append(weight.index_select(0, torch.from_numpy(sample * own.shape[1] + slot).to(device)))
        else:
            weights.append(torch.from_numpy(merge_weights(scores, own)[own]))
    sample, slot, weight = np.concatenate(samples), np.concatenate(slots), joined(weights, 0)
    if len(groups) > 1:
        order = sample.argsort(kind="stable")
        sample, slot, weight = sample[order], slot[order], weight[torch.from_numpy(order).to(weight.device)]
    sizes = np.stack([own.sum(1) for _, own in groups], 1)
    exist = sizes > 0
    rows = sample * decision.survivors.shape[1] - skipped[sample] + slot
    return _Merged(exist, sizes[exist], np.stack(positions, 1)[exist], rows, weight)


@dataclass(frozen=True)
class _Moves:
    """Where tokens go; slots are counted over all samples.

    Attributes:
        lengths: ``[B]`` slots of each sample afterwards, without padding.
        slots: N', the number of slots of a sample afterwards.
        source: ``[K]`` slots that survivors leave.
        source_rows: ``[K]`` their rows.
        target: ``[K]`` slots that they get.
        target_rows: ``[K]`` the rows that they get.
        merged_target: ``[M]`` slots that merged tokens get.
        merged_rows: ``[M]`` the rows that they get.
    """

    lengths: Numbers
    slots: int
    source: Numbers
    source_rows: Numbers
    target: Numbers
    target_rows: Numbers
    merged_target: Numbers
    merged_rows: Numbers


def _moves(survivors: Flags, counts: Numbers, source: Numbers, merged: _Merged | None, skipped: Numbers) -> _Moves:
    """Survivors fill the first slots of their sample; merged tokens follow in the order of their groups."""
    lengths = counts if merged is None else counts + merged.exist.sum(1)
    slots = int(lengths.max(initial=0))
    sample = np.arange(len(survivors)).repeat(counts)
    starts = lengths.cumsum() - lengths
    rank = np.arange(len(source)) - (counts.cumsum() - counts)[sample]
    target_rows = starts[sample] + rank
    fresh = padding_before(lengths, slots)
    merged_rows = np.zeros(0, dtype=np.int64)
    if merged is not None:
        merged_rows = ((starts + counts - 1)[:, None] + merged.exist.cumsum(1))[merged.exist]
    return _Moves(
        lengths=lengths,
        slots=slots,
        source=source,
        source_rows=source - skipped[sample],
        target=target_rows + fresh[sample],
        target_rows=target_rows,
        merged_target=merged_rows if merged is None else merged_rows + fresh[merged.exist.nonzero()[0]],
        merged_rows=merged_rows,
    )


def _in_order(decision: Decision, config: PruningConfig, counts: Numbers) -> Numbers:
    """The slots of survivors, sample by sample in the order in which they are to stand."""
    survivors = decision.survivors
    if config.order == "position":
        return np.flatnonzero(survivors)
    importance, candidates = _whole(decision)
    order = survivor_order(torch.from_numpy(survivors), importance, candidates, config.order).numpy()
    batch, slots = survivors.shape
    chosen: Numbers = (order + np.arange(batch)[:, None] * slots)[np.arange(slots) < counts[:, None]]
    return chosen


def _whole(decision: Decision) -> tuple[Tensor, Tensor]:
    """S and the candidates ``[B, N]`` of all groups."""
    importance = torch.zeros(decision.survivors.shape)
    candidates = torch.zeros(decision.survivors.shape, dtype=torch.bool)
    for group in decision.groups:
        own = torch.ones(group.importance.shape, dtype=torch.bool)
        if group.candidates is not None:
            own = torch.from_numpy(group.candidates)
        candidates[:, group.first :] |= own
        scores = importance[:, group.first :]
        scores.copy_(torch.where(own, torch.from_numpy(group.scores), scores))
    return importance, candidates


def _gathered(tokens: Tensor, moves: _Moves, merged: _Merged | None) -> Tensor:
    """The rows ``[T', C]``: each is a weighted sum of rows ``[T, C]``, that of a survivor of itself alone."""
    if merged is None:
        return tokens.index_select(0, torch.from_numpy(moves.source_rows).to(tokens.device))
    sizes = np.ones(len(moves.target_rows) + len(moves.merged_rows), dtype=np.int64)
    sizes[moves.merged_rows] = merged.sizes
    starts = sizes.cumsum() - sizes
    kept = starts[moves.target_rows]
    is_member = np.ones(len(kept) + len(merged.rows), dtype=bool)
    is_member[kept] = False
    picked = np.empty(len(is_member), dtype=np.int64)
    picked[kept] = moves.source_rows
    picked[is_member] = merged.rows
    if merged.weights.requires_grad:
        place = torch.from_numpy(np.flatnonzero(is_member)).to(tokens.device)
        weights = merged.weights.new_ones(len(is_member)).index_copy(0, place, merged.weights)
    else:
        ones = np.ones(len(is_member), dtype=np.float32)
        ones[is_member] = merged.weights.numpy()
        weights = torch.from_numpy(ones)
    return summed_rows(tokens, picked, weights.to(tokens), sizes)


def summed_rows(tokens: Tensor, picked: Numbers, weights: Tensor, sizes: Numbers) -> Tensor:
    """Return weighted sums of rows, ``[T', C]``. No row is part of two sums.

    Args:
        tokens: ``[T, C]``.
        picked: the rows of each sum, those of the first sum first.
        weights: their weights.
        sizes: ``[T']`` number of rows of each sum, at least 1.
    """
    chosen = torch.from_numpy(picked).to(tokens.device)
    starts = torch.from_numpy(sizes.cumsum() - sizes).to(tokens.device)
    if not torch.is_grad_enabled() or not (tokens.requires_grad or weights.requires_grad):
        return F.embedding_bag(chosen, tokens, starts, mode="sum", per_sample_weights=weights)
    target = torch.from_numpy(np.arange(len(sizes)).repeat(sizes)).to(tokens.device)
    summed: Tensor = _SummedRows.apply(tokens, weights, chosen, starts, target)
    return summed


class _SummedRows(torch.autograd.Function):
    """The sums, with a gradient that is deterministic on every device and has one of its own."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, tokens: Tensor, weights: Tensor, chosen: Tensor, starts: Tensor, target: Tensor
    ) -> Tensor:
        ctx.save_for_backward(tokens, weights, chosen, target)
        return F.embedding_bag(chosen, tokens, starts, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, chosen, target = ctx.saved_tensors
        spread = gradient.index_select(0, target)
        of_tokens = of_weights = None
        if ctx.needs_input_grad[0]:
            of_tokens = torch.zeros_like(tokens).index_copy(0, chosen, spread * weights.unsqueeze(1))
        if ctx.needs_input_grad[1]:
            of_weights = (spread * tokens.index_select(0, chosen)).sum(1)
        return of_tokens, of_weights, None, None, None


class _TokenFields(TypedDict):
    """The fields of a state that say which token each slot holds."""

    index: Tensor
    valid: Tensor | None
    merged: Tensor
    host: HostTokens


def _tokens_of(
    before: Numbers, was_merged: Flags, moves: _Moves, merged: _Merged | None, device: torch.device
) -> _TokenFields:
    """Which token each slot holds afterwards; ``before [B, N]`` are original positions so far."""
    shape = (len(moves.lengths), moves.slots)
    index = np.zeros(shape[0] * shape[1], dtype=np.int64)
    is_merged = np.zeros(len(index), dtype=bool)
    index[moves.target] = before.reshape(-1)[moves.source]
    is_merged[moves.target] = was_merged.reshape(-1)[moves.source]
    if merged is not None:
        index[moves.merged_target] = merged.positions
        is_merged[moves.merged_target] = True
    ragged = bool((moves.lengths != moves.slots).any())
    filled = torch.from_numpy(np.arange(moves.slots) < moves.lengths[:, None]).to(device) if ragged else None
    index, is_merged = index.reshape(shape), is_merged.reshape(shape)
    on_device = torch.from_numpy(index).to(device)
    return _TokenFields(
        index=on_device,
        valid=filled,
        merged=torch.from_numpy(is_merged).to(device),
        host=HostTokens(on_device, index, is_merged),
    )


def quirks_of(config: PruningConfig) -> Quirks | None:
    """Return what a configuration has of the authors' code; None for nothing."""
    quirks = Quirks(reads_slots=config.readout == "original", ignores_cross_masks=config.cross_mask == "ignored")
    return quirks if quirks.reads_slots or quirks.ignores_cross_masks else None


def _mask_index(
    state: TokenState, decision: Decision, config: PruningConfig, *, causal: bool, length: int
) -> Tensor | None:
    """Where masks are read, if not at the positions of the tokens.

    The authors' code crops causal masks, and reads others by falling importance although the tokens are not sorted
    (``docs/deviations.md``).
    """
    device = None if state.index is None else state.index.device
    if causal and config.causal_mask == "cropped":
        return torch.arange(length, device=device).expand(state.batch, length)
    if config.mask_order == "tokens":
        return state.mask_index
    importance, candidates = _whole(decision)
    survivors = torch.from_numpy(decision.survivors)
    if not bool((candidates & ~survivors).any()):
        return state.mask_index
    before = state.mask_index if state.mask_index is not None else state.index
    kept = int(survivors.sum(1).max()) - int((~candidates[0]).sum())
    positions = sorted_positions(importance, candidates, kept).to(device)
    return positions if before is None else before.gather(1, positions)
