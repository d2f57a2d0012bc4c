"""What a rule says, and the helpers that rules share.

Start at :class:`Outcome`: labels of the result of an operation, and the repairs that keep it correct once token axes are
shorter than they were captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from rewriters.axes.labels import (
    Axis,
    Dim,
    LabelMap,
    Labels,
    ResultLabels,
    axes_of,
    dim_size,
    has_tokens,
    is_plain,
    plain,
    token_axis,
)
from rewriters.axes.readouts import Readout
from rewriters.graph.nodes import AxisError, is_tensor, op_name


@dataclass(frozen=True, kw_only=True)
class Align:
    """A side input to gather, so that it runs along a token axis as the other operands do.

    Attributes:
        operand: The side input.
        dim: Dimension to gather along, counted in the broadcast result.
        axis: The token axis that it is to run along.
        batch_dim: The dimension of the broadcast result that is the batch.
        rank: Number of dimensions of the broadcast result.
        present: The token axis that it runs along now; None if it holds all tokens.
        heads: How many consecutive rows belong to one sample where the batch is folded with heads.
    """

    operand: fx.Node
    dim: int
    axis: Axis
    batch_dim: int
    rank: int
    present: Axis | None = None
    heads: int = 1


@dataclass(frozen=True)
class Resize:
    """The size argument ``position`` of ``args[argument]`` becomes the present length of ``axis`` (None: inferred)."""

    argument: int
    position: int
    axis: Axis | None


@dataclass(frozen=True)
class RenamedArgument:
    """The positional argument ``position`` is passed under the name ``name`` instead."""

    position: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rule says about an operation.

    Attributes:
        labels: Labels of the result or of the results; None if it is not a tensor.
        aligns: Side inputs to gather.
        resizes: Sizes to replace.
        readout: What the operation reads of a token axis.
        states: Token axes whose states the operation takes, by the name of the argument.
        renamed: An argument to pass under another name.
    """

    labels: Labels | ResultLabels | None = None
    aligns: tuple[Align, ...] = ()
    resizes: tuple[Resize, ...] = ()
    readout: Readout | None = None
    states: Mapping[str, Axis] = field(default_factory=dict)
    renamed: RenamedArgument | None = None


Rule = Callable[[fx.Node, LabelMap], Outcome]


def query_and_key(node: fx.Node, labels: LabelMap) -> tuple[Dim, Dim]:
    """Labels of the dimensions along which the queries and the keys of attention run."""
    first, second = (labels.of(node.args[i]) for i in (0, 1))
    return (first[2], second[2]) if op_name(node) == "attention" else (first[2], first[3])


def same_axes(first: Dim, second: Dim) -> bool:
    """Whether two dimensions run along the same tokens, or both along a batch."""
    kinds = [
        tuple(f.axis if f.axis is None or f.axis.kind == "tokens" else f.axis.kind for f in d) for d in (first, second)
    ]
    return kinds[0] == kinds[1]


class Broadcast(NamedTuple):
    """Labels of operands that are combined, and the side inputs to gather for it."""

    labels: Labels
    aligns: tuple[Align, ...]


def elementwise_outcome(operands: Sequence[fx.Node], labels: LabelMap, shape: Sequence[int]) -> Outcome:
    """The outcome of an element-wise combination of ``operands``."""
    merged = broadcast(operands, labels, shape)
    return Outcome(labels=merged.labels, aligns=merged.aligns)


def broadcast(operands: Sequence[fx.Node], labels: LabelMap, shape: Sequence[int], skip: int = 0) -> Broadcast:
    """Labels of ``operands`` broadcast to ``shape``; the last ``skip`` dimensions are left out."""
    rank = len(shape)
    merged: list[Dim] = [plain(n) for n in shape]
    per_operand = {n: labels.of(n) for n in operands}
    for own in per_operand.values():
        for offset in range(1 + skip, len(own) + 1):
            dim = own[-offset]
            if not is_plain(dim):
                merged[rank - offset] = _merge(merged[rank - offset], dim, labels)
    result = Labels(merged)
    aligns: list[Align] = []
    for operand, own in per_operand.items():
        for offset in range(1 + skip, len(own) + 1):
            target, dim = merged[rank - offset], own[-offset]
            if not has_tokens(target) or dim_size(dim) == 1 or same_axes(dim, target):
                continue
            axis, present = token_axis(target), None if is_plain(dim) else token_axis(dim)
            assert axis is not None
            batch_dim, heads = result.batch_and_heads()
            aligns.append(
                Align(
                    operand=operand,
                    dim=rank - offset,
                    axis=axis,
                    batch_dim=batch_dim,
                    rank=rank,
                    present=present,
                    heads=heads,
                )
            )
    return Broadcast(result, tuple(aligns))


def _merge(first: Dim, second: Dim, labels: LabelMap) -> Dim:
    """Labels of a dimension that two operands share; the newer state of one stream wins."""
    if is_plain(first):
        return second
    if same_axes(first, second):
        return first
    old, new = token_axis(first), token_axis(second)
    if old is None or new is None:
        raise AxisError(f"a dimension runs along {axes_of(first)} in one operand and {axes_of(second)} in another")
    winner = labels.newer(old, new)
    if winner is None:
        raise AxisError(f"two token axes that have nothing to do with each other meet ({old} and {new})")
    return first if winner == old else second


def require_plain(dims: Iterable[Dim], node: fx.Node) -> None:
    """Raise :class:`AxisError` if ``node``, which mixes values along ``dims``, would mix tokens or samples."""
    for dim in dims:
        if not is_plain(dim):
            raise AxisError(f"{op_name(node)} mixes values along {axes_of(dim)[0].kind}")


def require_unlabelled(operands: Iterable[object], labels: LabelMap, node: fx.Node) -> None:
    """Raise :class:`AxisError` if one of ``operands``, which ``node`` takes as parameters, runs along an axis."""
    for operand in operands:
        if not isinstance(operand, fx.Node) or not is_tensor(operand) or operand not in labels:
            continue
        if not all(is_plain(d) for d in labels.of(operand)):
            raise AxisError(f"{op_name(node)} takes {operand.name}, which runs along tokens, as a parameter")
