"""Masks that are applied to attention scores, between the product and the softmax, and how they become one operand.

Start at :func:`join`.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, example_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Mask:
    """A mask that is applied to scores.

    Attributes:
        kind: "add" if it is added to the scores; "hide" or "show" if it is true at keys that are hidden or shown.
        node: the mask.
        scores: sizes of the scores that it is applied to.
        times: what an added mask is multiplied by.
        hidden: the number that takes the place of a hidden score.
    """

    kind: Literal["add", "hide", "show"]
    node: fx.Node
    scores: tuple[int, ...]
    times: float = 1.0
    hidden: float = -math.inf

    @property
    def rank(self) -> int:
        """Dimensions of the scores."""
        return len(self.scores)


def join(graph: fx.Graph, masks: list[Mask], like: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """All masks as one operand: boolean if all hide by minus infinity, else additive.

    A query all of whose keys are hidden by one finite number weighs them alike. It also does so where the lowest number of the
    type is added to its scores, which are lost in it; with a boolean mask it would read nothing.

    Args:
        graph: it gets new nodes at its insertion point.
        masks: the masks, in the order in which they are applied.
        like: a node of the same module.
        dtype: type of an additive mask.
    """
    by_infinity = all(math.isinf(mask.hidden) for mask in masks if mask.kind != "add")
    lowest = -math.inf if by_infinity else torch.finfo(dtype).min
    total: fx.Node | None = None
    shown: fx.Node | None = None
    for mask in masks:
        if mask.kind == "add":
            node = mask.node if mask.times == 1.0 else emit(graph, aten.mul.Tensor, (mask.node, mask.times), like)
            total = total if shown is None else _lowered(graph, total, shown, lowest, like, dtype)
            total, shown = node if total is None else emit(graph, aten.add.Tensor, (total, node), like), None
        else:
            own = _shown(graph, mask, like)
            shown = own if shown is None else emit(graph, aten.bitwise_and.Tensor, (shown, own), like)
    if shown is None or (total is None and by_infinity):
        return total if shown is None else shown
    return _lowered(graph, total, shown, lowest, like, dtype)


def _shown(graph: fx.Graph, mask: Mask, like: fx.Node) -> fx.Node:
    """A mask that hides or shows, as a boolean that is true where keys are shown."""
    node = mask.node
    if node.meta["val"].dtype != torch.bool:
        node = emit(graph, aten.to.dtype, (node, torch.bool), like)
    return emit(graph, aten.bitwise_not.default, (node,), like) if mask.kind == "hide" else node


def _lowered(
    graph: fx.Graph, total: fx.Node | None, shown: fx.Node, lowest: float, like: fx.Node, dtype: torch.dtype
) -> fx.Node:
    """The additive mask ``total`` with ``lowest`` in place of its values where keys are not shown."""
    if total is None:
        total = emit(graph, aten.zeros_like.default, (shown,), like, dtype=dtype)
    return emit(graph, aten.where.ScalarOther, (shown, total, lowest), like)


def fold_mask(graph: fx.Graph, mask: Mask, query: fx.Node, like: fx.Node) -> fx.Node:
    """A mask of scores ``[B, W, H, Q, K]`` as one of scores ``[B * W, H, Q, K]``; masks of other scores stay as they are."""
    shape = example_shape(mask.node)
    if mask.rank != 5 or len(shape) < 4:
        return mask.node
    batch, _, queries, _ = example_shape(query)
    if mask.scores[0] * mask.scores[1] != batch or mask.scores[3] != queries:
        raise AxisError("its mask is one of scores that are not folded as windows of samples")
    node = mask.node if len(shape) == 5 else emit(graph, aten.unsqueeze.default, (mask.node, 0), like)
    samples, windows = example_shape(node)[:2]
    if samples == 1 and windows > 1:
        rows = emit(graph, aten.sym_size.int, (query, 0), like)
        each = emit(graph, operator.floordiv, (rows, emit(graph, aten.sym_size.int, (node, 1), like)), like)
        node = emit(graph, aten.expand.default, (node, [each, -1, -1, -1, -1]), like)
    elif windows == 1 and samples > 1:
        raise AxisError("its mask differs from sample to sample, but not from window to window")
    return emit(graph, aten.flatten.using_ints, (node, 0, 1), like)


def unfold_mask(graph: fx.Graph, mask: fx.Node, heads: int, like: fx.Node, rank: int) -> fx.Node:
    """A mask of scores ``[B * H, Q, K]`` as one of scores ``[B, H, Q, K]``; a mask of scores of ``rank`` 4 stays as it is."""
    shape = example_shape(mask)
    if rank == 4 or len(shape) < 3:
        return mask
    total = math.prod(example_shape(like)[:1])
    if shape[0] == total and heads > 1:
        return emit(graph, aten.unflatten.int, (mask, 0, [-1, heads]), like)
    if heads > 1 and shape[0] != 1:
        raise AxisError("its mask is neither one for each head nor one for all")
    return emit(graph, aten.unsqueeze.default, (mask, 1), like)
