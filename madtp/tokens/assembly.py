"""Assembly of a pruned stream: survivors and merged tokens as packed rows, and the state that says what they are.

Start at :func:`assemble`.

Axis legend: B samples, T rows of all samples, N slots of a sample, K survivors of all samples, G groups of which each gets its
own merged token, C width; T', N' the same afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.merging import MergedPosition, merge_weights, merged_position
from madtp.method.selection import sorted_positions, survivor_order
from madtp.tokens.packed_rows import Numbers, packed_rows, padding_before
from madtp.tokens.packing import lengths_of
from madtp.tokens.state import Quirks, TokenState, positions_of


@dataclass(frozen=True)
class Decision:
    """What a site has decided about the N tokens of each sample.

    Attributes:
        survivors: ``[B, N]`` bool, protected tokens included.
        groups: the candidates ``[B, N]`` of each group (segment) that is merged into one token.
        valid: ``[B, N]`` bool, False on padding.
        scores: importance S ``[B, N]``.
    """

    survivors: Tensor
    groups: Sequence[Tensor]
    valid: Tensor
    scores: Tensor

    @property
    def candidates(self) -> Tensor:
        """``[B, N]`` the tokens that pruning might have taken."""
        return torch.stack(list(self.groups)).any(0)


def assemble(
    tokens: Tensor, state: TokenState, decision: Decision, config: PruningConfig, *, causal: bool
) -> tuple[Tensor, TokenState]:
    """Put together the pruned stream: of each sample the survivors, then one merged token per group.

    Args:
        tokens: rows ``[T, C]`` along ``state``.
        state: before pruning.
        decision: which of the tokens survive.
        config: the fields ``merge``, ``order`` and the official rules for masks and readouts are read.
        causal: tokens see only earlier ones.

    Returns:
        rows ``[T', C]`` and their state. Nothing changes where nothing is dropped.
    """
    dropped = [group & ~decision.survivors for group in decision.groups] if config.merge else []
    merged = [merged_position(decision.scores, one, decision.valid, config.merged_mask) for one in dropped]
    # Here the host waits for the decision: it has to know how long the result is, and keeps account of where tokens go.
    survivors = decision.survivors.cpu().numpy()
    members = [one.cpu().numpy() for one in dropped]
    exist = np.stack([one.exists.cpu().numpy() for one in merged], 1) if merged else survivors[:, :0]
    counts = survivors.sum(1)
    if counts.tolist() == list(lengths_of(state)):
        return tokens, state
    moves = _moves(state, decision, config, survivors, exist)
    before = positions_of(state, torch.device("cpu")).cpu()
    stands_for = None
    if exist.any():
        stands_for = _merged_positions(before.numpy(), merged, members, config, causal=causal)[exist]
    after = _next_state(state, decision, config, moves, before.numpy(), stands_for, causal=causal)
    rows = tokens.index_select(0, moves.picked.to(tokens.device))
    if exist.any():
        values = _merged_tokens(tokens, state, decision, dropped, members)
        target = torch.from_numpy(moves.merged_rows).to(tokens.device)
        rows.index_copy_(0, target, values[torch.from_numpy(np.flatnonzero(exist)).to(tokens.device)].to(rows.dtype))
    return rows, after


@dataclass(frozen=True)
class _Moves:
    """Where tokens go; slots are counted over all samples.

    Attributes:
        lengths: ``[B]`` slots of each sample afterwards, without padding.
        slots: N', the number of slots of a sample afterwards.
        source: ``[K]`` slots that survivors leave.
        target: ``[K]`` slots that they get.
        merged_target: slots that merged tokens get, those of the first sample first.
        merged_rows: the rows that they get.
        picked: ``[T']`` row that each row comes from; that of a merged token does not matter.
    """

    lengths: Numbers
    slots: int
    source: Numbers
    target: Numbers
    merged_target: Numbers
    merged_rows: Numbers
    picked: Tensor


def _moves(state: TokenState, decision: Decision, config: PruningConfig, survivors: Numbers, exist: Numbers) -> _Moves:
    """Survivors fill the first slots of their sample; merged tokens follow in the order of their groups."""
    batch, slots_before = survivors.shape
    counts = survivors.sum(1)
    lengths = counts + exist.sum(1)
    slots = int(lengths.max(initial=0))
    first = np.arange(batch) * slots
    skipped = padding_before(lengths, slots)
    source = _in_order(decision, config, survivors, counts)
    sample = source // max(1, slots_before)
    rank = np.arange(len(source)) - np.repeat(counts.cumsum() - counts, counts)
    target = first[sample] + rank
    merged_target = (first[:, None] + counts[:, None] + exist.cumsum(1) - 1)[exist]
    merged_rows = merged_target - np.repeat(skipped, exist.sum(1))
    picked = np.zeros(int(lengths.sum()), dtype=np.int64)
    picked[target - skipped[sample]] = source - _skipped_before(state)[sample]
    return _Moves(lengths, slots, source, target, merged_target, merged_rows, torch.from_numpy(picked))


def _in_order(decision: Decision, config: PruningConfig, survivors: Numbers, counts: Numbers) -> Numbers:
    """The slots of survivors, sample by sample in the order in which they are to stand."""
    if config.order == "position":
        return np.flatnonzero(survivors)
    order = survivor_order(decision.survivors, decision.scores, decision.candidates, config.order).cpu().numpy()
    batch, slots = survivors.shape
    chosen: Numbers = (order + np.arange(batch)[:, None] * slots)[np.arange(slots) < counts[:, None]]
    return chosen


def _skipped_before(state: TokenState) -> Numbers:
    """``[B]`` padding slots of the samples before each."""
    return padding_before(np.array(lengths_of(state), dtype=np.int64), state.length)


def _next_state(
    state: TokenState,
    decision: Decision,
    config: PruningConfig,
    moves: _Moves,
    before: Numbers,
    stands_for: Numbers | None,
    *,
    causal: bool,
) -> TokenState:
    """The state afterwards; ``before [B, N]`` are the positions so far, ``stands_for`` those of merged tokens, if any."""
    batch, device = len(moves.lengths), decision.survivors.device
    index = np.zeros(batch * moves.slots, dtype=np.int64)
    index[moves.target] = before.reshape(-1)[moves.source]
    is_merged = np.zeros(batch * moves.slots, dtype=bool)
    if state.merged is not None:
        is_merged[moves.target] = state.merged.cpu().numpy().reshape(-1)[moves.source]
    if stands_for is not None:
        index[moves.merged_target] = stands_for
        is_merged[moves.merged_target] = True
    filled = np.arange(moves.slots) < moves.lengths[:, None]
    shape = (batch, moves.slots)
    return TokenState(
        index=torch.from_numpy(index.reshape(shape)).to(device),
        valid=None if filled.all() else torch.from_numpy(filled).to(device),
        merged=torch.from_numpy(is_merged.reshape(shape)).to(device),
        mask_index=_mask_index(state, decision, config, causal=causal, length=moves.slots),
        full_length=state.full_length,
        length=moves.slots,
        batch=batch,
        quirks=quirks_of(config),
        rows=packed_rows(moves.lengths.tolist(), moves.slots, device),
    )


def quirks_of(config: PruningConfig) -> Quirks | None:
    """Return what a configuration has of the authors' code; None for nothing."""
    quirks = Quirks(reads_slots=config.readout == "original", ignores_cross_masks=config.cross_mask == "ignored")
    return quirks if quirks.reads_slots or quirks.ignores_cross_masks else None


def _merged_positions(
    before: Numbers,
    merged: Sequence[MergedPosition],
    members: Sequence[Numbers],
    config: PruningConfig,
    *,
    causal: bool,
) -> Numbers:
    """The original position ``[B, G]`` that the merged token of each group stands for; ``members [B, N]`` are dropped."""
    if causal and config.causal_mask == "gathered":
        # A merged token sees what its last member sees, and no earlier token sees it.
        return np.stack([np.where(own, before, -1).max(1).clip(min=0) for own in members], 1)
    slots = np.stack([one.slot.cpu().numpy() for one in merged], 1)
    return np.take_along_axis(before, slots, 1)


def _merged_tokens(
    tokens: Tensor, state: TokenState, decision: Decision, dropped: Sequence[Tensor], members: Sequence[Numbers]
) -> Tensor:
    """The merged token of each group of each sample, ``[B * G, C]`` float32: sum_j w_j x_j over its members."""
    skipped, groups = _skipped_before(state), len(dropped)
    rows, weights, targets = [], [], []
    for number, (one, own) in enumerate(zip(dropped, members, strict=True)):
        slots = np.flatnonzero(own)
        sample = slots // own.shape[1]
        rows.append(slots - skipped[sample])
        targets.append(sample * groups + number)
        weights.append(merge_weights(decision.scores, one).flatten()[torch.from_numpy(slots).to(tokens.device)])
    chosen = tokens.index_select(0, torch.from_numpy(np.concatenate(rows)).to(tokens.device))
    weighted = chosen * torch.cat(weights).unsqueeze(1)
    target = torch.from_numpy(np.concatenate(targets)).to(tokens.device)
    sums = weighted.new_zeros(len(skipped) * groups, tokens.size(1))
    return sums.index_add(0, target, weighted)


def _mask_index(
    state: TokenState, decision: Decision, config: PruningConfig, *, causal: bool, length: int
) -> Tensor | None:
    """Where masks are read, if not at the positions of the tokens.

    The authors' code crops causal masks, and reads others by falling importance although the tokens are not sorted
    (``docs/deviations.md``).
    """
    survivors, candidates = decision.survivors, decision.candidates
    if causal and config.causal_mask == "cropped":
        return torch.arange(length, device=survivors.device).expand(state.batch, length)
    if config.mask_order == "tokens" or not bool((candidates & ~survivors).any()):
        return state.mask_index
    before = state.mask_index if state.mask_index is not None else state.index
    kept = int(survivors.sum(1).max()) - int((~candidates[0]).sum())
    positions = sorted_positions(decision.scores, candidates, kept)
    return positions if before is None else before.gather(1, positions)
