"""Assembly of a pruned stream: survivors, merged tokens and padding, and the state that says what the slots hold.

Start at :func:`assemble`.

Axis legend: B samples, N slots now, N' slots afterwards, G groups of which each gets its own merged token, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.merging import merge_weights, merged_position, merged_token
from madtp.method.selection import sorted_positions, survivor_order
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


@dataclass(frozen=True)
class _Merged:
    """The merged token of a group: value ``[B, 1, C]``, position ``[B, 1]`` it stands for, whether there is one ``[B]``."""

    value: Tensor
    position: Tensor
    exists: Tensor


def assemble(
    tokens: Tensor, state: TokenState, decision: Decision, config: PruningConfig, *, causal: bool
) -> tuple[Tensor, TokenState]:
    """Put together the pruned stream: survivors first, then one merged token per group, then padding slots.

    Args:
        tokens: ``[B, N, C]`` along ``state``.
        state: before pruning.
        decision: which of the tokens survive.
        config: the fields ``merge``, ``order`` and the official rules for masks and readouts are read.
        causal: tokens see only earlier ones.

    Returns:
        tokens ``[B, N', C]`` and their state, whose tensors moved by the same indices.
    """
    batch, count, _ = tokens.shape
    device = tokens.device
    survivors, candidates = decision.survivors, decision.candidates
    index = positions_of(state, device)
    merged = torch.zeros_like(survivors) if state.merged is None else state.merged
    order = survivor_order(survivors, decision.scores, candidates, config.order)
    counts = survivors.sum(1)
    totals = counts
    exist = torch.zeros(batch, 1, dtype=torch.bool, device=device)
    if config.merge:
        made = [_merge(tokens, index, group & ~survivors, decision, config, causal) for group in decision.groups]
        exist = torch.stack([one.exists for one in made], 1)
        totals = counts + exist.sum(1)
        tokens = torch.cat([tokens, *(one.value for one in made)], 1)
        index = torch.cat([index, *(one.position for one in made)], 1)
        merged = torch.cat([merged, torch.ones_like(exist)], 1)
    length = int(totals.max())
    slots = torch.arange(length, device=device).expand(batch, length)
    # Merged tokens follow in the order of their groups; one that stands for nothing comes last and is padding.
    ranks = exist.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    behind = (slots - counts[:, None]).clamp(0, ranks.size(1) - 1)
    last = (count + ranks.gather(1, behind)).clamp(max=tokens.size(1) - 1)
    source = torch.nn.functional.pad(order, (0, ranks.size(1)))[:, :length]
    source = torch.where(slots < counts[:, None], source, last)
    filled = slots < totals[:, None]
    after = TokenState(
        index=index.gather(1, source),
        valid=None if bool(filled.all()) else filled,
        merged=merged.gather(1, source),
        mask_index=_mask_index(state, decision, config, causal=causal, length=length),
        full_length=state.full_length,
        length=length,
        batch=batch,
        quirks=Quirks(reads_slots=config.readout == "original", ignores_cross_masks=config.cross_mask == "ignored"),
    )
    return tokens.gather(1, source[:, :, None].expand(-1, -1, tokens.size(2))), after


def _merge(
    tokens: Tensor, index: Tensor, dropped: Tensor, decision: Decision, config: PruningConfig, causal: bool
) -> _Merged:
    """Merge the ``dropped [B, N]`` tokens of one group; ``index [B, N]`` has the original positions."""
    weights = merge_weights(decision.scores, dropped)
    slot, exists = merged_position(decision.scores, dropped, decision.valid, config.merged_mask)
    if causal and config.causal_mask == "gathered":
        # A merged token sees what its last member sees, and no earlier token sees it.
        position = index.masked_fill(~dropped, -1).amax(1, keepdim=True).clamp(min=0)
    else:
        position = index.gather(1, slot[:, None])
    return _Merged(merged_token(tokens, weights).to(tokens.dtype), position, exists)


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
