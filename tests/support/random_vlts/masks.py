"""Padding and causal masks in the forms that models give them. Start at :class:`MaskMaker`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from random_vlts.design import Blocks


@dataclass(frozen=True)
class Masks:
    """What a block's attention gets beside its tokens.

    mask: boolean (True: seen) or additive, broadcasts to [B, H, N, K]. causal: tokens see earlier ones, and there is no mask.
    bias: additive, by relative position. rotate: of queries and keys. keys: [B, K], True at tokens; later: [N, N], True where
    hidden (both for torch's own module).
    """

    mask: Tensor | None = None
    causal: bool = False
    bias: Tensor | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    keys: Tensor | None = None
    later: Tensor | None = None

    def joined(self, like: Tensor) -> Tensor | None:
        """Mask and bias as one operand."""
        if self.bias is None:
            return self.mask
        if self.mask is None:
            return self.bias
        if self.mask.dtype == torch.bool:
            return self.bias.masked_fill(~self.mask, torch.finfo(like.dtype).min)
        return self.bias + self.mask

    def added(self, query: Tensor, key: Tensor) -> Tensor:
        """Mask and bias as one additive operand, zeros if there are none."""
        both = self.joined(query)
        if both is None:
            return query.new_zeros(1, 1, query.shape[2], key.shape[2])
        if both.dtype == torch.bool:
            return (~both).to(query.dtype) * torch.finfo(query.dtype).min
        return both


class MaskMaker(nn.Module):
    """Makes the masks of a stream once, for all its blocks."""

    def __init__(self, blocks: Blocks, causal: bool = False) -> None:
        super().__init__()
        self.form, self.causal, self.multihead = blocks.mask, causal, blocks.multihead
        self.implicit = blocks.product == "sdpa" and blocks.positions not in ("table", "buckets", "slopes")

    def forward(self, x: Tensor, seen: Tensor | None, length: int) -> Masks:
        """For queries of ``length`` tokens and keys that ``seen`` [B, K] marks; ``x`` gives dtype and device."""
        if self.multihead:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1) if self.causal else None
            return Masks(keys=None if seen is None else seen.bool(), later=later)
        if self.causal and seen is None and self.implicit:
            return Masks(causal=True)
        shown = None if seen is None else self._boolean(seen.bool(), length)
        if self.causal:
            earlier = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            if shown is not None or self.form not in ("boolean_keys", "additive_square"):
                earlier = earlier[None, None]
            shown = earlier if shown is None else shown & earlier
        return Masks(mask=None if shown is None else self._in_form(shown, x))

    def _boolean(self, seen: Tensor, length: int) -> Tensor:
        if self.form == "additive_pairs" and seen.shape[1] == length:
            return (seen[:, :, None] & seen[:, None, :]).unsqueeze(1)
        row = seen.unsqueeze(1).unsqueeze(1) if self.form == "boolean_keys" else seen[:, None, None, :]
        return row.expand(-1, -1, length, -1) if self.form.endswith("square") else row

    def _in_form(self, shown: Tensor, x: Tensor) -> Tensor:
        if self.form.startswith("boolean"):
            return shown
        if self.form == "infinite":
            return torch.zeros(shown.shape, dtype=x.dtype, device=x.device).masked_fill(~shown, float("-inf"))
        lowest = -10000.0 if self.form == "additive_large" else torch.finfo(x.dtype).min
        return (1.0 - shown.to(x.dtype)) * lowest


def with_positions(masks: Masks, bias: Tensor | None, rotate: Callable[[Tensor], Tensor] | None) -> Masks:
    """The masks with what positions add."""
    return replace(masks, bias=bias, rotate=rotate)
