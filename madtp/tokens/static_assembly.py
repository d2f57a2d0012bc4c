"""Assembly of a pruned stream with fixed counts: every sample keeps as many tokens as every other, so shapes do not depend on
values.

Start at :func:`assemble_static`. Each sample keeps M tokens: first those that must survive, then the best candidates. Merged
tokens, one per group, fill the slots behind them. Nothing here asks for a value on the host, so compilers and exporters can
follow it; ``assembly.py`` is its counterpart with content-adaptive counts.

Axis legend: B samples, N slots of a sample, M kept tokens, G groups of which each gets its own merged token, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from madtp.calls.compiling import is_compiling
from madtp.errors import MadtpError
from madtp.method.merging import merge_weights, merged_position
from madtp.tokens.state import TokenState, positions_of

CHOSEN = 1e30
"""Rank of the tokens that their group has chosen."""


@dataclass(frozen=True, kw_only=True)
class StaticGroup:
    """Candidates that are judged together, and how many of them every sample keeps.

    Attributes:
        candidates: ``[B, N]`` bool.
        ranking: ``[B, N]``, the larger the better.
        count: number of candidates to keep.
    """

    candidates: Tensor
    ranking: Tensor
    count: int


@dataclass(frozen=True, kw_only=True)
class StaticDecision:
    """What a site with fixed counts has to keep.

    Attributes:
        groups: the candidates, group by group.
        required: ``[B, N]`` bool, the tokens that survive in any case.
        room: slots for these. Where a sample has fewer of them, further candidates fill the slots.
        varies: whether some sample may have more of them than there is room for.
        scores: importance S ``[B, N]``, the weights of merging.
        valid: ``[B, N]`` bool, False on padding; None if no slot of any sample is padding.
    """

    groups: Sequence[StaticGroup]
    required: Tensor
    room: int
    varies: bool
    scores: Tensor
    valid: Tensor | None

    @property
    def kept(self) -> int:
        """M, the number of tokens that every sample keeps."""
        return self.room + sum(group.count for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class StaticSelection:
    """The M tokens of each sample.

    Attributes:
        slots: ``[B, M]`` int64, in rising order.
        survivors: ``[B, N]`` bool.
    """

    slots: Tensor
    survivors: Tensor


def select_static(decision: StaticDecision) -> StaticSelection:
    """Choose the tokens that survive; padding fills what a short sample leaves free.

    Raises:
        MadtpError: a sample has more required tokens than there is room for.
    """
    rank = torch.full_like(decision.scores, float("-inf"))
    for group in decision.groups:
        rank = torch.where(group.candidates, group.ranking, rank)
    if len(decision.groups) > 1:  # ranks of different groups are compared only for what is left when each has chosen
        for group in decision.groups:
            own = group.ranking.masked_fill(~group.candidates, float("-inf"))
            best = own.topk(min(group.count, own.size(1)), dim=1).indices
            chosen = torch.zeros_like(group.candidates).scatter(1, best, True) & group.candidates
            rank = rank.masked_fill(chosen, CHOSEN)
    rank = rank.masked_fill(decision.required, float("inf"))
    if decision.varies:
        _check_room(decision)
    slots = rank.topk(decision.kept, dim=1, sorted=False).indices.sort(dim=1).values
    survivors = torch.zeros_like(decision.required).scatter(1, slots, True)
    if decision.valid is not None:
        survivors = survivors & (decision.valid | decision.required)
    return StaticSelection(slots=slots, survivors=survivors)


def _check_room(decision: StaticDecision) -> None:
    most = decision.required.sum(1).max()
    if is_compiling():  # a check that runs with the compiled graph
        torch._assert_async(most <= decision.kept, f"a sample has more than {decision.kept} tokens that must survive")
    elif int(most) > decision.kept:
        raise MadtpError(
            f"a sample has {int(most)} tokens that must survive at a site that was frozen to {decision.kept}; freeze the model "
            "with batches that hold such samples."
        )


def assemble_static(
    tokens: Tensor,
    state: TokenState,
    decision: StaticDecision,
    selection: StaticSelection,
    *,
    merge: bool,
    causal: bool,
) -> tuple[Tensor, TokenState]:
    """Put together the pruned stream: of each sample M tokens, then one merged token per group.

    Args:
        tokens: ``[B * N, C]`` along ``state``.
        state: before pruning; its rows are its slots.
        decision: what had to be kept.
        selection: what is kept.
        merge: merge what is dropped.
        causal: tokens see only earlier ones.

    Returns:
        ``[B * (M + G), C]`` and their state.
    """
    device, slots = tokens.device, selection.slots
    batch, kept = slots.shape
    before = positions_of(state, device)
    index, merged = [before.gather(1, slots)], [_merged_so_far(state, slots)]
    single = decision.valid is None and len(decision.groups) == 1
    valid = None if single else [selection.survivors.gather(1, slots)]
    first = torch.arange(batch, device=device).unsqueeze(1) * state.length
    rows = tokens.index_select(0, (first + slots).flatten()).unflatten(0, (batch, kept))
    if merge:
        everything = torch.ones_like(decision.required) if decision.valid is None else decision.valid
        weights = []
        for group in decision.groups:
            dropped = group.candidates & ~selection.survivors
            position = merged_position(decision.scores, dropped, everything)
            index.append(_stands_for(before, dropped, position.slot, causal=causal))
            merged.append(torch.ones_like(position.exists).unsqueeze(1))
            weights.append(merge_weights(decision.scores, dropped))
            if valid is not None:
                valid.append(position.exists.unsqueeze(1))
        values = torch.stack(weights, 1).to(tokens.dtype) @ tokens.unflatten(0, (batch, state.length))
        rows = torch.cat([rows, values], 1)
    after = TokenState(
        index=torch.cat(index, 1),
        valid=None if valid is None else torch.cat(valid, 1),
        merged=torch.cat(merged, 1),
        full_length=state.full_length,
        length=rows.size(1),
        batch=state.batch,
        static=True,
    )
    return rows.flatten(0, 1), after


def _merged_so_far(state: TokenState, slots: Tensor) -> Tensor:
    if state.merged is None:
        return torch.zeros_like(slots, dtype=torch.bool)
    return state.merged.gather(1, slots)


def _stands_for(before: Tensor, dropped: Tensor, slot: Tensor, *, causal: bool) -> Tensor:
    """The original position ``[B, 1]`` that a merged token stands for."""
    if causal:  # it sees what its last member sees, and no earlier token sees it
        return before.masked_fill(~dropped, 0).amax(1, keepdim=True)
    return before.gather(1, slot.unsqueeze(1))
