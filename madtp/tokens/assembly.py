"""Assembly of a pruned stream: survivors, merged tokens and padding, and the state that says what the slots hold.

Start at :func:`assemble`. Axis legend: B samples, N slots now, N' slots afterwards, G groups that are merged apart, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.merging import merge_weights, merged_position, merged_token
from madtp.method.selection import sorted_positions, survivor_order
from madtp.tokens.state import Quirks, TokenState


def assemble(
    tokens: Tensor,
    state: TokenState,
    survivors: Tensor,
    groups: Sequence[Tensor],
    valid: Tensor,
    scores: Tensor,
    config: PruningConfig,
    *,
    causal: bool,
) -> tuple[Tensor, TokenState]:
    """Survivors first, then one merged token a group, then padding slots; all fields move by the same indices.

    Args:
        tokens: ``[B, N, C]`` along ``state``.
        survivors: ``[B, N]`` bool.
        groups: the tokens ``[B, N]`` that pruning might have taken, by group (segment).
        valid: ``[B, N]`` False on padding.
        scores: ``[B, N]``.
        causal: tokens see only earlier ones.
    """
    batch, count, _ = tokens.shape
    device = tokens.device
    candidates = torch.stack(list(groups)).any(0)
    index = torch.arange(count, device=device).expand(batch, count) if state.index is None else state.index
    merged = torch.zeros_like(survivors) if state.merged is None else state.merged
    order = survivor_order(survivors, scores, candidates, config.order)
    counts = survivors.sum(1)
    totals = counts
    seen = torch.zeros(batch, 1, dtype=torch.bool, device=device)
    if config.merge:
        made = [_merge(tokens, index, group & ~survivors, valid, scores, config, causal) for group in groups]
        seen = torch.stack([one[2] for one in made], 1)
        totals = counts + seen.sum(1)
        tokens = torch.cat([tokens, *(one[0] for one in made)], 1)
        index = torch.cat([index, *(one[1] for one in made)], 1)
        merged = torch.cat([merged, torch.ones_like(seen)], 1)
    length = int(totals.max())
    slots = torch.arange(length, device=device).expand(batch, length)
    # Merged tokens follow in the order of their groups; one that stands for nothing comes last and is padding.
    ranks = seen.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    behind = (slots - counts[:, None]).clamp(0, ranks.size(1) - 1)
    last = (count + ranks.gather(1, behind)).clamp(max=tokens.size(1) - 1)
    source = torch.nn.functional.pad(order, (0, ranks.size(1)))[:, :length]
    source = torch.where(slots < counts[:, None], source, last)
    alive = slots < totals[:, None]
    after = TokenState(
        index=index.gather(1, source),
        valid=None if bool(alive.all()) else alive,
        merged=merged.gather(1, source),
        mask_index=_mask_index(state, candidates & ~survivors, candidates, scores, counts, config, causal, length),
        full_length=state.full_length,
        length=length,
        batch=batch,
        quirks=Quirks(config.readout == "original", config.cross_mask == "ignored"),
    )
    return tokens.gather(1, source[:, :, None].expand(-1, -1, tokens.size(2))), after


def _merge(
    tokens: Tensor,
    index: Tensor,
    dropped: Tensor,
    valid: Tensor,
    scores: Tensor,
    config: PruningConfig,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The merged token ``[B, 1, C]`` of one group, the position ``[B, 1]`` it stands for, and whether there is one ``[B]``."""
    weights = merge_weights(scores, dropped)
    slot, seen = merged_position(scores, dropped, valid, config.merged_mask)
    if causal and config.causal_mask == "gathered":
        stands_for = index.masked_fill(~dropped, -1).amax(1, keepdim=True).clamp(min=0)
    else:
        stands_for = index.gather(1, slot[:, None])
    return merged_token(tokens, weights).to(tokens.dtype), stands_for, seen


def _mask_index(
    state: TokenState,
    dropped: Tensor,
    candidates: Tensor,
    scores: Tensor,
    counts: Tensor,
    config: PruningConfig,
    causal: bool,
    length: int,
) -> Tensor | None:
    """The authors' reading of masks: cropped where causal, else by falling score while the tokens are not sorted
    (docs/deviations.md)."""
    if causal and config.causal_mask == "cropped":
        return torch.arange(length, device=scores.device).expand(state.batch, length)
    if config.mask_order == "tokens" or not bool(dropped.any()):
        return state.mask_index
    before = state.mask_index if state.mask_index is not None else state.index
    kept = int(counts.max()) - int((~candidates[0]).sum())
    positions = sorted_positions(scores, candidates, kept)
    return positions if before is None else before.gather(1, positions)
