"""What a rule says, and the helpers that rules share.

Start at :class:`Outcome`: labels of the result of an operation, and the repairs that keep it correct once token axes are
shorter than they were captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from rewriters.axes.labels import (
    Axis,
    Dim,
    Labels,
    axes_of,
    dim_size,
    has_tokens,
    is_plain,
    plain,
    token_axis,
    unlabelled,
)
from rewriters.graph.nodes import AxisError, example_shape, is_tensor, op_name


@dataclass(frozen=True)
class Align:
    """Gather ``operand`` along ``dim`` (counted in the broadcast result) so that it runs along ``axis``. heads: how many rows
    in a row are of one sample where the batch is folded with heads."""

    operand: fx.Node
    dim: int
    axis: Axis
    batch_dim: int
    rank: int
    present: Axis | None = None
    heads: int = 1


@dataclass(frozen=True)
class Resize:
    """The size argument ``position`` of ``args[argument]`` becomes the present length of ``axis`` (-1: inferred)."""

    argument: int
    position: int
    axis: Axis | None


@dataclass(frozen=True)
class Readout:
    """A place where a token axis ends.

    kind: "position" (constant index), "prefix" (the first tokens), "rest" (all but the first), "range" (tokens from
    ``bounds[0]`` to ``bounds[1]``, numbers or graph values), "cuts" (ranges that begin at ``bounds``), "index" (a graph
    value per sample), "pool" (mean, amax over tokens), "masked_mean", "length" (the size of the axis), "batch" (a slice
    of the batch; the axis goes on), "join" (the axis goes on in a concatenation). keepdim: a position leaves a dimension
    of size 1.
    """

    kind: Literal[
        "position", "prefix", "rest", "range", "cuts", "index", "pool", "masked_mean", "length", "batch", "join"
    ]
    axis: Axis
    dim: int
    batch_dim: int | None = None
    position: int = 0
    index: fx.Node | None = None
    parts: tuple[int, ...] = ()
    bounds: tuple[Any, ...] = (0, None)
    keepdim: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a rule says: labels of the result (a tuple of labels for several results) and the repairs. renamed: an argument
    by position that is to be passed under another name."""

    labels: Labels | None = None
    results: tuple[Labels, ...] | None = None
    aligns: tuple[Align, ...] = ()
    resizes: tuple[Resize, ...] = ()
    readout: Readout | None = None
    states: Mapping[str, Axis] = field(default_factory=dict)
    renamed: tuple[int, str] | None = None


LabelMap = Mapping[fx.Node, Labels | tuple[Labels, ...]]


Rule = Callable[[fx.Node, LabelMap], Outcome]


def labels_of(node: Any, labels: LabelMap) -> Labels:
    """Labels of a tensor operand; an operand that was never labelled runs along no axis."""
    known = labels.get(node)
    if known is not None:
        return known  # type: ignore[return-value]
    return unlabelled(example_shape(node))


def query_and_key(node: fx.Node, labels: LabelMap) -> tuple[Dim, Dim]:
    """Labels of the dimensions along which the queries and the keys of attention run."""
    first, second = (labels_of(node.args[i], labels) for i in (0, 1))
    return (first[2], second[2]) if op_name(node) == "attention" else (first[2], first[3])


def batch_dim_of(labels: Labels) -> int:
    """The dimension that is the batch; raises if there is none or it is folded with others."""
    for position, dim in enumerate(labels):
        if any(a.kind == "batch" for a in axes_of(dim)):
            if len(dim) > 1:
                raise AxisError("the batch is folded together with other dimensions")
            return position
    raise AxisError("a token axis stands without its batch")


def outer_batch(labels: Labels) -> tuple[int, int]:
    """The dimension that is the batch, alone or in front of heads, and the number of heads folded into it."""
    for position, dim in enumerate(labels):
        if any(a.kind == "batch" for a in axes_of(dim)):
            if dim[0].axis is None or dim[0].axis.kind != "batch" or has_tokens(dim):
                raise AxisError("the batch is folded together with other dimensions")
            return position, dim_size(dim[1:])
    raise AxisError("a token axis stands without its batch")


def same_axes(first: Dim, second: Dim) -> bool:
    """Whether two dimensions run along the same tokens, or both along a batch."""
    kinds = [
        tuple(f.axis if f.axis is None or f.axis.kind == "tokens" else f.axis.kind for f in d) for d in (first, second)
    ]
    return kinds[0] == kinds[1]


def broadcast(
    node: fx.Node, operands: list[fx.Node], labels: LabelMap, shape: tuple[int, ...], skip: int = 0
) -> Outcome:
    """Element-wise combination of ``operands`` with broadcasting to ``shape``; the last ``skip`` dimensions are left
    out."""
    rank = len(shape)
    merged: list[Dim] = [plain(n) for n in shape]
    per_operand = {n: labels_of(n, labels) for n in operands}
    for own in per_operand.values():
        for offset in range(1 + skip, len(own) + 1):
            dim = own[-offset]
            if not is_plain(dim):
                merged[rank - offset] = _merge(merged[rank - offset], dim, labels)
    aligns: list[Align] = []
    for operand, own in per_operand.items():
        for offset in range(1 + skip, len(own) + 1):
            target, dim = merged[rank - offset], own[-offset]
            if not has_tokens(target) or dim_size(dim) == 1:
                continue
            if is_plain(dim):
                axis = token_axis(target)
                assert axis is not None
                batch_dim, heads = outer_batch(tuple(merged))
                aligns.append(Align(operand, rank - offset, axis, batch_dim, rank, heads=heads))
            elif not same_axes(dim, target):
                old, new = token_axis(dim), token_axis(target)
                assert new is not None
                batch_dim, heads = outer_batch(tuple(merged))
                aligns.append(Align(operand, rank - offset, new, batch_dim, rank, old, heads))
    return Outcome(labels=tuple(merged), aligns=tuple(aligns))


def _merge(first: Dim, second: Dim, labels: LabelMap) -> Dim:
    """Labels of a dimension that two operands share; the newer state of one stream wins."""
    if is_plain(first):
        return second
    if same_axes(first, second):
        return first
    old, new = token_axis(first), token_axis(second)
    if old is None or new is None:
        raise AxisError(f"a dimension runs along {axes_of(first)} in one operand and {axes_of(second)} in another")
    lineage = getattr(labels, "newer", None)
    winner = lineage(old, new) if lineage is not None else None
    if winner is None:
        raise AxisError(f"two token axes that have nothing to do with each other meet ({old} and {new})")
    return first if winner == old else second


def require_plain(dims: tuple[Dim, ...], node: fx.Node) -> None:
    for dim in dims:
        if not is_plain(dim):
            raise AxisError(f"{op_name(node)} mixes values along {axes_of(dim)[0].kind}")


def require_unlabelled(operands: list[fx.Node], labels: LabelMap, node: fx.Node) -> None:
    for operand in operands:
        if is_tensor(operand) and operand in labels and not all(is_plain(d) for d in labels_of(operand, labels)):
            raise AxisError(f"{op_name(node)} takes {operand.name}, which runs along tokens, as a parameter")
