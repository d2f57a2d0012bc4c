"""Attention in windows of a grid, in a block that is followed by a site.

Axis legend: B' windows of all samples, H heads, Q queries, K keys of a window.
"""

from __future__ import annotations

from torch import Tensor, nn

from madtp.sites.control import PruningControl
from madtp.tokens.attention import attention, attention_with_statistics
from madtp.tokens.grid import hide


class WindowAttention(nn.Module):
    """The self-attention in windows of a block that is followed by a site."""

    def __init__(self, control: PruningControl) -> None:
        super().__init__()
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
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention as :func:`madtp.tokens.attention.attention`, and what each key received: ``[B', 1, K, 1]``, the sum
        over the queries of the strongest head; None while pruning is off.

        Args:
            query, key, value: ``[B', H, Q, D]``, Q = K, all tokens of the grid.
            visible: ``[B', 1, K, 1]``, False for tokens that were dropped; None where none was.
        """
        if not self.control.active:
            output = attention(
                query, key, value, mask, dropout_p, causal, scale=scale, grouped=grouped, softcap=softcap
            )
            return output, None
        rows = None if visible is None else visible[:, 0, :, 0]
        shown = hide(mask, visible)
        output, statistics = attention_with_statistics(
            query,
            key,
            value,
            shown,
            dropout_p,
            causal,
            scale=scale,
            grouped=grouped,
            softcap=softcap,
            rows=rows,
            class_slot=None,
        )
        assert statistics.received is not None
        return output, statistics.received[:, None, :, None]
