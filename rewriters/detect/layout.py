"""Layout: how the tokens of a stream that several modalities share are arranged.

Start at :func:`find_layout`. Either parts were concatenated along the tokens, or a mask gives the positions at which features
of one modality were merged into the sequence of another, in the graph or in front of it. The walk goes back from the stream's
first residual value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from rewriters.detect.modality import special_positions, stream_modality
from rewriters.graph.dependencies import is_learned
from rewriters.graph.node_record import record
from rewriters.graph.nodes import (
    call_argument,
    example_shape,
    int_argument,
    is_attention,
    is_tensor,
    normal_dim,
    op_name,
    tensor_operands,
)
from rewriters.graph.op_sets import CONCATENATIONS, PERMUTATIONS
from rewriters.graph.walk import walk

# How features get to the image positions of a sequence.
_SCATTERS = frozenset(("masked_scatter", "where"))


REORDERINGS = frozenset("flip roll index_select index gather take_along_dim sort".split())
"""Behind these, a token is no longer where it was written."""


@dataclass(frozen=True)
class LayoutPart:
    """One operand of a concatenation.

    Attributes:
        node: the operand.
        dim: its token dimension.
        segment: number of the segment that it belongs to.
        special: positions of learned tokens in it.
    """

    node: fx.Node
    dim: int
    segment: int
    special: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Segments of a stream.

    Attributes:
        segments: the modality of each.
        parts: operands of the concatenation that they come from; none if a mask separates the segments.
        mask: [B, N, ...], true at the positions of segment 1; None for a concatenation.
    """

    segments: tuple[str, ...]
    parts: tuple[LayoutPart, ...] = ()
    mask: fx.Node | None = None


def find_layout(head: fx.Node, token_dim: int) -> Layout | None:
    """The layout of the stream whose first residual value is ``head``; None if its tokens are of one modality."""
    for value in _values_before(head, token_dim):
        node, dim = value.node, value.dim
        if _is_concatenation(value):
            return _concatenated(_operands(value))
        scattered = _scattered(node) if op_name(node) in _SCATTERS and dim == 1 else None
        if scattered is not None:
            return scattered
        mask = record(node).image_positions
        if mask is not None and dim == 1:
            return Layout(("text", "image"), mask=mask)
    return None


class _TokenValue(NamedTuple):
    """A node and its token dimension."""

    node: fx.Node
    dim: int


def _values_before(head: fx.Node, token_dim: int) -> Iterator[_TokenValue]:
    """Yields values with as many tokens that ``head`` may have its tokens from, nearest first."""
    dims = {head: token_dim}

    def onward(node: fx.Node) -> Iterator[fx.Node]:
        if not _is_computed(node) or op_name(node) in CONCATENATIONS | REORDERINGS | {"masked_scatter"}:
            return
        shape, dim = example_shape(node), dims[node]
        for before in tensor_operands(node):
            own = example_shape(before)
            if before in dims or len(own) != len(shape):
                continue
            place = dim
            if op_name(node) in PERMUTATIONS and len(shape) == 3:
                place = next((d for d in (0, 1) if own[d] == shape[dim]), dim)
            if own[place] == shape[dim] and not is_learned(before):
                dims[before] = place
                yield before

    for node in walk([head], onward):
        if _is_computed(node) or record(node).image_positions is not None:
            yield _TokenValue(node, dims[node])


def _is_computed(node: fx.Node) -> bool:
    return node.op == "call_function" and is_tensor(node) and not is_attention(node)


def _is_concatenation(value: _TokenValue) -> bool:
    """Whether a value is a concatenation along its tokens."""
    if op_name(value.node) not in CONCATENATIONS:
        return False
    return normal_dim(int_argument(value.node, 1, "dim", 0), len(example_shape(value.node))) == value.dim


def _operands(concatenation: _TokenValue) -> list[_TokenValue]:
    """The operands of a concatenation, those of concatenations among them in their stead."""
    found: list[_TokenValue] = []
    for operand in call_argument(concatenation.node, 0, "tensors", ()):
        if example_shape(operand) == (0,):
            continue
        value = _TokenValue(operand, concatenation.dim)
        if not is_learned(operand) and stream_modality(operand) == "joint":
            inner = next((v for v in _values_before(*value) if _is_concatenation(v) and v.dim == value.dim), None)
            if inner is not None:
                found.extend(_operands(inner))
                continue
        found.append(value)
    return found


def _concatenated(operands: list[_TokenValue]) -> Layout | None:
    """The layout of concatenated operands; None if they are of one modality."""
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
    """The layout of a sequence that features of another modality are put into; None if the modalities do not differ."""
    first, second, third = node.args[:3]
    base, mask, features = (first, second, third) if op_name(node) == "masked_scatter" else (third, first, second)
    if not (is_tensor(base) and is_tensor(mask) and is_tensor(features)):
        return None
    if mask.meta["val"].dtype != torch.bool or example_shape(mask)[:2] != example_shape(node)[:2]:
        return None
    modalities = (stream_modality(base), stream_modality(features))
    return Layout(modalities, mask=mask) if modalities[0] != modalities[1] else None
