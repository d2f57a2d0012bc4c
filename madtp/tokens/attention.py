"""Attention over the tokens that survive, and the statistics that pruning reads off it.

Start at :func:`attention`, the one attention node of a rewritten graph: it stands for every spelling of attention that the
rewriter recognises. :class:`AttentionInputs` holds what such a node is given. ``scored_attention.py`` also yields what the
importance needs, and ``packed_attention.py`` runs on packed rows.

Axis legend: B samples, H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.calls.compiling import is_compiling
from madtp.method.arrays import precise
from madtp.tokens.state import TokenState, gather_positions
from madtp.tokens.windows import Windows, from_windows, in_windows, numbers_by_length, window_of_each

if TYPE_CHECKING:
    from typing_extensions import Unpack

# An additive mask below this value hides a key: models use -10000 or the smallest number of the dtype.
HIDDEN = -1000.0
QUERY_BLOCK = 128


class AttentionOptions(TypedDict, total=False):
    """Options of an attention that a graph passes by name.

    Attributes:
        scale: factor on the scores; None for ``D ** -0.5``.
        grouped: keys and values have fewer heads than queries, each serving several of them.
        softcap: scores s become ``softcap * tanh(s / softcap)`` before the mask is added; None for no cap.
        windows: a token sees the tokens of its own window only; None for all of them (``windows.py``).
    """

    scale: float | None
    grouped: bool
    softcap: float | None
    windows: Windows | None


@dataclass(frozen=True)
class AttentionInputs:
    """What an attention is given.

    Attributes:
        query: ``[B, H, Q, D]``.
        key: ``[B, H, K, D]``; fewer heads if ``grouped``.
        value: ``[B, H, K, Dv]``; fewer heads if ``grouped``.
        mask: boolean (True where a query sees a key) or additive, broadcastable to ``[B, H, Q, K]``.
        dropout_p: dropout probability of the attention weights.
        causal: a query sees only keys up to its own position.
        scale: as in :class:`AttentionOptions`, and so are ``grouped``, ``softcap`` and ``windows``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout_p: float
    causal: bool
    scale: float | None = None
    grouped: bool = False
    softcap: float | None = None
    windows: Windows | None = None

    def over_survivors(
        self, query_state: TokenState | None, key_state: TokenState | None, present_mask: Tensor | None
    ) -> AttentionInputs:
        """Return the inputs with a mask over the tokens that are present; see :func:`attention`."""
        mask, causal = mask_of_survivors(self, query_state, key_state, present_mask)
        inputs = replace(self, mask=mask, causal=causal)
        rows, columns = (None if state is None else mask_positions(state) for state in (query_state, key_state))
        return inputs if rows is None and columns is None else inputs.with_windows_masked(rows, columns)

    def with_windows_masked(self, rows: Tensor | None = None, columns: Tensor | None = None) -> AttentionInputs:
        """Return the inputs with windows as a part of the mask.

        Args:
            rows: original positions of the queries, ``[B, Q]``; None if all are there. ``columns`` are those of the keys.
        """
        if self.windows is None:
            return self
        own = window_of_each(self.windows, self.query.device)
        row, column = (own[None] if at is None else own[at] for at in (rows, columns))
        same = row[:, None, :, None] == column[:, None, None, :]
        return replace(self, mask=same if self.mask is None else join_masks(self.mask, same), windows=None)

    def of_windows(self) -> list[tuple[list[int], AttentionInputs]]:
        """Return numbers of windows of one length and their inputs, with windows as samples; there must be no mask."""
        assert self.windows is not None
        groups = []
        for numbers in numbers_by_length(self.windows):
            query, key, value = (in_windows(x, self.windows, numbers, 2) for x in (self.query, self.key, self.value))
            groups.append((numbers, replace(self, query=query, key=key, value=value, windows=None)))
        return groups

    def ungrouped(self) -> AttentionInputs:
        """Return the inputs with one head of keys and values for each head of the queries."""
        if not self.grouped:
            return self
        heads = self.query.size(1)
        return replace(self, key=_each_head(self.key, heads), value=_each_head(self.value, heads), grouped=False)


class ProbabilityBlock(NamedTuple):
    """Probabilities ``[B, H, stop - start, K]`` of the queries from ``start`` to ``stop``."""

    start: int
    stop: int
    probabilities: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    *,
    present_mask: Tensor | None = None,
    query_state: TokenState | None = None,
    key_state: TokenState | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """Scaled dot-product attention over surviving tokens.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, H, K, D]``.
        value: ``[B, H, K, Dv]``.
        mask: boolean (True where a query sees a key) or additive, broadcastable to ``[B, H, Q0, K0]``: over the *original*
            tokens.
        dropout_p: dropout probability of the attention weights.
        causal: a token sees only earlier ones.
        present_mask: a mask over the tokens that are present, in place of ``mask``: a bias that is computed from them.
        query_state: state of the stream of the queries; None if it is not pruned.
        key_state: state of the stream of the keys; None if it is not pruned.
        **options: see :class:`AttentionOptions`.

    Returns:
        ``[B, H, Q, Dv]``.
    """
    inputs = AttentionInputs(query, key, value, mask, dropout_p, causal, **options)
    return plain_attention(inputs.over_survivors(query_state, key_state, present_mask))


def plain_attention(inputs: AttentionInputs) -> Tensor:
    """Return the output ``[B, H, Q, Dv]`` of an attention, by torch's fused kernels where they can compute it."""
    if inputs.windows is not None:
        if inputs.mask is not None or inputs.causal:
            return plain_attention(inputs.with_windows_masked())
        return from_windows([(numbers, plain_attention(own)) for numbers, own in inputs.of_windows()], 2)
    if inputs.softcap is None:
        return F.scaled_dot_product_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.mask,
            inputs.dropout_p,
            inputs.causal,
            scale=inputs.scale,
            enable_gqa=inputs.grouped,
        )
    inputs = inputs.ungrouped()
    blocks = probability_blocks(inputs, queries_without_keys(inputs), QUERY_BLOCK)
    return joined([weighted(block.probabilities, inputs.value, inputs.dropout_p) for block in blocks], 2)


def mask_of_survivors(
    inputs: AttentionInputs,
    query_state: TokenState | None,
    key_state: TokenState | None,
    present_mask: Tensor | None,
) -> tuple[Tensor | None, bool]:
    """Return the mask over surviving tokens, and whether the attention still has to be causal.

    The rows and columns of a mask over the original tokens are gathered, causality among survivors becomes part of the mask,
    and padding slots are hidden.

    Args:
        inputs: the inputs of the attention; their mask is over the original tokens.
        query_state: state of the stream of the queries; None if it is not pruned.
        key_state: state of the stream of the keys; None if it is not pruned.
        present_mask: a mask over the surviving tokens, in place of the one in ``inputs``.
    """
    query, key, mask = inputs.query, inputs.key, inputs.mask
    rows = None if query_state is None else mask_positions(query_state)
    columns = None if key_state is None else mask_positions(key_state)
    if rows is None and columns is None:
        return mask if present_mask is None else present_mask, inputs.causal
    quirks = None if key_state is None or key_state is query_state else key_state.quirks
    if quirks is not None and quirks.ignores_cross_masks:
        mask = None
    if inputs.causal:
        row = torch.arange(query.size(2), device=query.device)[None] if rows is None else rows
        column = torch.arange(key.size(2), device=key.device)[None] if columns is None else columns
        # The batch is that of the states: queries may be packed rows.
        order = row[:, None, :, None] >= column[:, None, None, :]
        mask = order if mask is None else join_masks(_gathered_mask(mask, query_state, key_state), order)
    else:
        mask = present_mask if mask is None else _gathered_mask(mask, query_state, key_state)
    if key_state is not None and key_state.valid is not None:
        valid = key_state.valid[:, None, None, :]
        mask = valid if mask is None else join_masks(mask, valid)
    return mask, False


def _gathered_mask(mask: Tensor, query_state: TokenState | None, key_state: TokenState | None) -> Tensor:
    for state, dim in ((query_state, 2), (key_state, 3)):
        index = None if state is None else mask_positions(state)
        if index is not None:
            mask = gather_positions(mask, index, dim, 0, 4)
    return mask


def mask_positions(state: TokenState) -> Tensor | None:
    """Return where masks over the original tokens are read, ``[B, N]``; None if nothing was pruned."""
    return state.index if state.mask_index is None else state.mask_index


def join_masks(mask: Tensor, visible: Tensor) -> Tensor:
    """Return ``mask`` with everything hidden that is False in ``visible``."""
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def hides_nothing(mask: Tensor) -> bool:
    """Whether a mask ``[B, 1, 1, K]`` hides no key, as the padding mask of texts that are equally long.

    A mask keeps torch from its faster kernels. The answer is always False where it would take a host that waits, where a
    compiler follows, or where the mask has a gradient.
    """
    if is_compiling() or mask.device.type != "cpu" or mask.requires_grad or mask.size(1) > 1 or mask.size(2) > 1:
        return False
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


def valid_keys(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return which keys some query of some head sees, ``[B, K]``, or None if all: the others are padding."""
    if mask is None or mask.size(-1) == 1:
        return None
    full = mask[(None,) * (4 - mask.dim())]
    seen = full.any(dim=(1, 2)) if mask.dtype == torch.bool else full.amax(dim=(1, 2)) > HIDDEN
    return seen.expand(batch, length)


def weighted(probabilities: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """Return the values weighted by probabilities, which dropout thins."""
    return F.dropout(probabilities.to(value.dtype), dropout_p, dropout_p > 0) @ value


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """Return ``parts`` concatenated; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _each_head(operand: Tensor, heads: int) -> Tensor:
    """Keys or values with one head for each of the queries'."""
    return operand if operand.size(1) == heads else operand.repeat_interleave(heads // operand.size(1), 1)


def queries_without_keys(inputs: AttentionInputs) -> Tensor | None:
    """Which queries see no key at all, such as padding on the left: ``[..., Q, 1]``, or 1 in place of Q.

    None without a mask, as then every query sees a key.
    """
    mask = inputs.mask
    if mask is None:
        return None
    hidden = ~mask if mask.dtype == torch.bool else mask == float("-inf")
    if inputs.causal:
        hidden = hidden | _later_keys(0, inputs.query.size(2), inputs.key.size(2), mask.device)
    return hidden.all(-1, keepdim=True)


def _later_keys(start: int, stop: int, keys: int, device: torch.device) -> Tensor:
    """``[Q, K]``, which keys come after each query from ``start`` to ``stop``."""
    return torch.arange(start, stop, device=device)[:, None] < torch.arange(keys, device=device)[None]


def probability_blocks(inputs: AttentionInputs, empty: Tensor | None, size: int) -> Iterator[ProbabilityBlock]:
    """Probabilities of ``size`` queries at a time, in float32 at least.

    They are zeros for ``empty`` queries, which see no key, as in torch's own attention.
    """
    query, key, mask, softcap = inputs.query, inputs.key, inputs.mask, inputs.softcap
    factor = query.size(-1) ** -0.5 if inputs.scale is None else inputs.scale
    transposed = key.transpose(-1, -2)
    for start in range(0, query.size(2), size):
        stop = min(start + size, query.size(2))
        scores = (query[:, :, start:stop] * factor) @ transposed
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if inputs.causal:
            scores = scores.masked_fill_(_later_keys(start, stop, key.size(2), scores.device), float("-inf"))
        if mask is not None:
            shown = _rows(mask, start, stop)
            scores = scores.masked_fill_(~shown, float("-inf")) if shown.dtype == torch.bool else scores + shown
        dtype = precise(scores.dtype)
        if empty is None:
            yield ProbabilityBlock(start, stop, scores.softmax(-1, dtype=dtype))
        else:
            zeros = _rows(empty, start, stop)
            yield ProbabilityBlock(
                start, stop, scores.masked_fill(zeros, 0).softmax(-1, dtype=dtype).masked_fill(zeros, 0)
            )


def _rows(mask: Tensor, start: int, stop: int) -> Tensor:
    """The rows of a mask for the queries from ``start`` to ``stop``."""
    return mask if mask.dim() < 2 or mask.size(-2) == 1 else mask[..., start:stop, :]
