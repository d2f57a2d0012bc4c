"""Attention that is not a softmax of one product: its map keeps the model's spelling.

The operations along the keys become nodes that can be told which keys are present.

Start at :func:`kept_maps`. Between the softmax and the product with the values heads may be mixed (talking heads), several maps
weighed, rows divided by their sum. All of this acts on each query and key by itself, and the rule table covers it. What is
left are the operations along the keys: softmaxes, sums, and the last product (``madtp/tokens/attention_maps.py``). Nothing is
decided here: labels tell later on whether a map runs along tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from madtp.tokens.attention import HIDDEN
from madtp.tokens.attention_maps import shares, total, weigh
from rewriters.canonicalise.attention_heads import fold_heads, folded_heads, unfold_heads
from rewriters.canonicalise.attention_scores import constant_number, has_scores, is_like_map, is_score_step
from rewriters.graph.dependencies import is_learned
from rewriters.graph.emit import emit
from rewriters.graph.match import Miss, nearest_miss, remember
from rewriters.graph.nodes import (
    AxisError,
    call_argument,
    example_shape,
    is_tensor,
    normal_dim,
    op_name,
    operand,
    tensor_operands,
)
from rewriters.graph.op_sets import FILLS, PRODUCTS, SOFTMAXES
from rewriters.graph.walk import ancestors, walk

aten = torch.ops.aten


@dataclass
class MapSubgraph:
    """An attention map: what mixes values along its keys.

    Attributes:
        product: the product with the values.
        is_shared: another product reads the map, too, and was replaced already.
        softmaxes: softmaxes over the keys.
        exponentials: exponentials of scores, of which a sum over the keys says how they are weighed.
        sums: sums over the keys.
    """

    product: fx.Node
    is_shared: bool = False
    softmaxes: list[fx.Node] = field(default_factory=list)
    exponentials: list[fx.Node] = field(default_factory=list)
    sums: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class MapMask:
    """A mask between the products of queries and keys and a map.

    Attributes:
        kind: "add" (low where keys are hidden), "hide" or "show".
        node: the mask.
    """

    kind: Literal["add", "hide", "show"]
    node: fx.Node


def kept_maps(graph: fx.Graph) -> None:
    """Replace, in place, what mixes values along the keys of each map."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in PRODUCTS or not node.users:
            continue
        found: MapSubgraph | None = None
        try:
            found = _map_of(node)
            if found is not None:
                _replace(graph, found)
        except AxisError as error:
            help = "a softmax over the keys and products of matrices [B, H, Q, K] and [B, H, K, D]"
            for softmax in () if found is None else found.softmaxes:
                remember(softmax, Miss(node, str(error), help, ("softmax", "map", "product with the values")))


def masks_of_map(product: fx.Node) -> list[MapMask]:
    """The masks between the products of queries and keys and the map that ``product`` weighs values by."""
    masks: list[MapMask] = []

    def onward(node: fx.Node) -> Iterator[fx.Node]:
        name, operands = op_name(node), tensor_operands(node)
        number = constant_number(node.args[2]) if name in FILLS else None
        if number is not None:
            fills = name == "masked_fill"
            if number <= HIDDEN:
                masks.append(MapMask("hide", operand(node, 1)) if fills else MapMask("show", operand(node)))
            operands = [operand(node, 0 if fills else 1)]
        elif name in ("add", "sub"):
            masks.extend(MapMask("add", n) for n in operands if name == "add" and not has_scores(n))
            operands = [n for n in operands if has_scores(n)]
        return filter(is_score_step, operands)

    weights = operand(product)
    for _ in walk([weights] if is_score_step(weights) else (), onward):
        pass
    return masks


def map_miss(product: fx.Node) -> Miss | None:
    """Why the softmaxes of the map that ``product`` weighs values by are not attention of a known spelling."""
    steps = ancestors(operand(product), through=is_score_step, among=is_tensor)
    misses = [miss for node in steps if op_name(node) == "shares" and (miss := nearest_miss(node)) is not None]
    return max(misses, key=lambda miss: len(miss.steps), default=None)


def _map_of(product: fx.Node) -> MapSubgraph | None:
    """The map that ``product`` weighs values by; None if its first operand is not made by a softmax over its last
    dimension, or by exponentials and their sum over it."""
    weights, values = product.args[:2]
    if op_name(product) == "baddbmm" or not is_tensor(weights) or not is_tensor(values):
        return None
    shape = example_shape(weights)
    if len(shape) not in (3, 4) or len(example_shape(values)) != len(shape):
        return None
    found = MapSubgraph(product)

    def is_step(node: fx.Node) -> bool:
        return node.op == "call_function" and op_name(node) not in PRODUCTS and op_name(node) != "attention"

    def may_be_of_map(node: fx.Node) -> bool:
        return is_tensor(node) and (is_like_map(node, shape) or _is_row(node, shape))

    for node in filter(is_step, ancestors(weights, through=is_step, among=may_be_of_map)):
        name = op_name(node)
        if name == "shares" and example_shape(node)[-2:] == shape[-2:]:
            found.is_shared = True
        elif name == "softmax" and _is_over_keys(node, node, shape):
            found.softmaxes.append(node)
        elif name == "exp" and is_like_map(node, shape) and has_scores(node):
            found.exponentials.append(node)
        elif name == "sum" and _is_over_keys(node, operand(node), shape):
            found.sums.append(node)
        elif name in SOFTMAXES:
            return None
    is_map = found.softmaxes or found.is_shared or (found.exponentials and found.sums)
    return found if is_map else None


def _is_over_keys(node: fx.Node, values: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether ``node`` mixes the last dimension of ``values``, which are a map."""
    dims = call_argument(node, 1, "dim", None)
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    own = example_shape(values)
    last = len(dims) == 1 and isinstance(dims[0], int) and normal_dim(dims[0], len(own)) == len(own) - 1
    return last and own[-2:] == shape[-2:]


def _is_row(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether ``node`` may hold one number for each query: a sum over the keys."""
    return op_name(node) in ("sum", "unsqueeze", "clamp", "clamp_min", "add") and shape[-2] in example_shape(node)


def _replace(graph: fx.Graph, found: MapSubgraph) -> None:
    scores = next((operand(n) for n in found.softmaxes if not is_learned(n)), None)
    if scores is not None and any(is_learned(n) and any(u < scores for u in n.users) for n in found.softmaxes):
        raise AxisError("a softmax over parameters is read before there are scores")
    product = found.product
    weights, values = operand(product), operand(product, 1)
    with graph.inserting_before(product):
        folded = len(example_shape(weights)) == 3
        if folded:
            heads = folded_heads(values)
            weights, values = (unfold_heads(graph, n, heads) for n in (weights, values))
        new = emit(graph, weigh, (weights, values), product)
        result = fold_heads(graph, new) if folded else new
    if example_shape(result) != example_shape(product):
        raise AxisError("its product with the values broadcasts")
    product.replace_all_uses_with(result)
    graph.erase_node(product)
    for node in found.softmaxes:
        _share(graph, node, scores)
    for node in found.sums:
        with graph.inserting_before(node):
            summed = operand(node)
            keepdim = len(example_shape(node)) == len(example_shape(summed))
            _swap(graph, node, emit(graph, total, (summed, keepdim), node))


def _share(graph: fx.Graph, node: fx.Node, scores: fx.Node | None) -> None:
    """A softmax as a node of its own. One over parameters alone runs along the tokens of the other scores, so that it, too, is
    over the keys that are left."""
    own = operand(node)
    along = scores if is_learned(node) else None
    with graph.inserting_after(along) if along is not None and node < along else graph.inserting_before(node):
        new = emit(graph, shares, (own, call_argument(node, 2, "dtype", None)), node)
        if along is not None:
            with graph.inserting_before(new):
                new.update_arg(0, emit(graph, aten.expand_as.default, (own, along), node))
    miss = nearest_miss(node)
    if miss is not None:
        remember(new, miss)
    _swap(graph, node, new)


def _swap(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    graph.erase_node(node)
