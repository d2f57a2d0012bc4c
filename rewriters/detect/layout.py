"""Layout: how the tokens of a stream that several modalities share are arranged.

Start at :func:`find_layout`. Either parts were concatenated along the tokens, or the features of one modality were written
into the sequence of another where a mask says so, in the graph or in front of it. The walk goes back from the stream's first
residual value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriters.detect.modality import special_positions, stream_modality
from rewriters.graph.node_record import record
from rewriters.graph.nodes import call_argument, example_shape, is_attention, is_tensor, normal_dim, op_name
from rewriters.graph.origins import is_learned

SCATTERS = frozenset(("masked_scatter", "where"))


@dataclass(frozen=True)
class LayoutPart:
    """One operand of a concatenation: its node and token dimension, the segment it belongs to, positions of learned tokens in
    it."""

    node: fx.Node
    dim: int
    segment: int
    special: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Segments of a stream, by modality; ``parts`` of a concatenation, or the ``mask`` [B, N, ...] that is true where the
    tokens of segment 1 were written."""

    segments: tuple[str, ...]
    parts: tuple[LayoutPart, ...] = ()
    mask: fx.Node | None = None


def find_layout(head: fx.Node, token_dim: int) -> Layout | None:
    """The layout of the stream whose first residual value is ``head``; None if its tokens are of one modality."""
    for node, dim in _before(head, token_dim):
        name = op_name(node)
        if name in ("cat", "concat") and normal_dim(call_argument(node, 1, "dim", 0), len(example_shape(node))) == dim:
            return _concatenated(_flat(node, dim))
        scattered = _scattered(node) if name in SCATTERS and dim == 1 else None
        if scattered is not None:
            return scattered
        mask = record(node).image_positions
        if mask is not None and dim == 1:
            return Layout(("text", "image"), mask=mask)
    return None


def _before(head: fx.Node, token_dim: int) -> list[tuple[fx.Node, int]]:
    """Nodes with as many tokens that ``head`` may have its tokens from, nearest first, each with its token dimension."""
    found: list[tuple[fx.Node, int]] = []
    waiting, seen = [(head, token_dim)], {head}
    while waiting:
        node, dim = waiting.pop(0)
        if record(node).image_positions is not None:
            found.append((node, dim))
        if node.op != "call_function" or not is_tensor(node) or is_attention(node):
            continue
        found.append((node, dim))
        if op_name(node) in ("cat", "concat", "masked_scatter"):
            continue
        shape = example_shape(node)
        for operand in node.all_input_nodes:
            if operand in seen or not is_tensor(operand) or len(example_shape(operand)) != len(shape):
                continue
            own = example_shape(operand)
            place = dim
            if op_name(node) in ("transpose", "permute") and len(shape) == 3:
                place = next((d for d in (0, 1) if own[d] == shape[dim]), dim)
            if own[place] == shape[dim] and not is_learned(operand):
                seen.add(operand)
                waiting.append((operand, place))
    return found


def _flat(node: fx.Node, dim: int) -> list[tuple[fx.Node, int]]:
    """The operands of a concatenation, those of concatenations among them in their stead."""
    operands: Any = node.args[0]
    found: list[tuple[fx.Node, int]] = []
    for operand in operands:
        if example_shape(operand) == (0,):
            continue
        if not is_learned(operand) and stream_modality(operand) == "joint":
            inner = next((n for n, d in _before(operand, dim) if op_name(n) in ("cat", "concat") and d == dim), None)
            if inner is not None and normal_dim(call_argument(inner, 1, "dim", 0), len(example_shape(inner))) == dim:
                found.extend(_flat(inner, dim))
                continue
        found.append((operand, dim))
    return found


def _concatenated(operands: list[tuple[fx.Node, int]]) -> Layout | None:
    modalities = [None if is_learned(node) else stream_modality(node) for node, _ in operands]
    if len({m for m in modalities if m is not None}) < 2:
        return None
    segments: list[str] = []
    parts: list[LayoutPart] = []
    for at, (node, dim) in enumerate(operands):
        own = modalities[at]
        # Learned tokens belong to what follows them, at the end to what comes before.
        modality = own or next((m for m in modalities[at:] if m is not None), None) or segments[-1]
        if not segments or segments[-1] != modality:
            segments.append(modality)
        special = range(example_shape(node)[dim]) if own is None else special_positions(node, dim)
        parts.append(LayoutPart(node, dim, len(segments) - 1, tuple(special)))
    return Layout(tuple(segments), tuple(parts))


def _scattered(node: fx.Node) -> Layout | None:
    if op_name(node) == "masked_scatter":
        base, mask, written = node.args[:3]
    else:
        mask, written, base = node.args[:3]
    if not all(is_tensor(n) for n in (base, mask, written)):
        return None
    assert isinstance(mask, fx.Node)
    assert isinstance(base, fx.Node)
    assert isinstance(written, fx.Node)
    shape = example_shape(node)
    if mask.meta["val"].dtype != torch.bool or example_shape(mask)[:2] != shape[:2]:
        return None
    modalities = (stream_modality(base), stream_modality(written))
    return Layout(modalities, mask=mask) if modalities[0] != modalities[1] else None
