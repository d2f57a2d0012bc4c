"""Attention in windows of a grid, in a block that is followed by a site.

Axis legend: B' windows of all samples, H heads, Q queries, K keys of a window, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from madtp.sites.control import PruningControl
from madtp.tokens.attention import AttentionInputs, AttentionOptions, plain_attention
from madtp.tokens.grid import hide
from madtp.tokens.scored_attention import Asked, attention_with_statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack


class WindowAttention(nn.Module):
    """The self-attention in windows of a block that is followed by a site. It runs on all tokens of the grid."""

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
        visible: Tensor | None = None,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention, and what each key receives.

        Args:
            query: ``[B', H, Q, D]``.
            key: ``[B', H, K, D]`` with K = Q.
            value: ``[B', H, K, D]``.
            mask: as in :func:`madtp.tokens.attention.attention`, and so are ``dropout_p``, ``causal`` and ``options``.
            visible: ``[B', 1, K, 1]`` bool, False at tokens that were dropped; None if there are none.

        Returns:
            The output ``[B', H, Q, D]``, and c ``[B', 1, K, 1]``, the sum over queries of the maximum over heads; None in
            place of the latter while pruning is off, or if nothing asks for it.
        """
        inputs = AttentionInputs(query, key, value, hide(mask, visible), dropout_p, causal, **options)
        if not self.control.active or not self.control.parts.needs.received:
            return plain_attention(inputs), None
        asked = Asked() if visible is None else Asked(counted=visible[:, 0, :, 0])
        output, statistics = attention_with_statistics(inputs, asked)
        assert statistics.received is not None
        return output, statistics.received[:, None, :, None]
