"""Attention that is no softmax of one product: the map keeps the model's spelling, and its steps along the keys become nodes
that can be told which keys are there.

Start at :func:`kept_maps`. Between the softmax and the product with the values heads may be mixed (talking heads),
several maps weighed, rows divided by their sum. All of this acts on each query and key by itself, and the rule table
covers it. What is left are the operations along the keys: softmaxes, sums, and the last product
(``madtp/tokens/attention_maps.py``). Nothing is decided here: whether a map runs along tokens is told by labels later
on.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from madtp.tokens.attention import HIDDEN
from madtp.tokens.attention_maps import shares, total, weigh
from rewriters.canonicalise.attention import (
    PRODUCTS,
    SOFTMAXES,
    constant_number,
    fold_heads,
    folded_heads,
    unfold_heads,
)
from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, call_argument, example_shape, is_tensor, normal_dim, op_name
from rewriters.graph.origins import is_learned

aten = torch.ops.aten


@dataclass
class Region:
    """An attention map: the product with the values, softmaxes and sums over its keys. shared: another product reads it, too,
    and was replaced already."""

    product: fx.Node
    shared: bool = False
    softmaxes: list[fx.Node] = field(default_factory=list)
    sums: list[fx.Node] = field(default_factory=list)


def kept_maps(graph: fx.Graph) -> None:
    """Replace, in place, what mixes values along the keys of each map."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in PRODUCTS and node.users:
            with suppress(AxisError):
                region = _region(node)
                if region is not None:
                    _replace(graph, region)


def masks_of_map(product: fx.Node) -> list[tuple[str, fx.Node]]:
    """The masks between the products of queries and keys and a map: "add" (low where keys are hidden), "hide" or "show"."""
    found: list[tuple[str, fx.Node]] = []
    waiting: list[Any] = [product.args[0]]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen or not _is_step(node):
            continue
        seen.add(node)
        name, operands = op_name(node), [n for n in node.all_input_nodes if is_tensor(n)]
        number = constant_number(node.args[2]) if name in ("masked_fill", "where") else None
        if number is not None:
            if number <= HIDDEN:
                found.append(("hide", node.args[1]) if name == "masked_fill" else ("show", node.args[0]))
            operands = [node.args[0] if name == "masked_fill" else node.args[1]]
        elif name in ("add", "sub"):
            found += [("add", n) for n in operands if name == "add" and not _has_scores(n)]
            operands = [n for n in operands if _has_scores(n)]
        waiting += operands
    return found


def _is_step(node: Any) -> bool:
    """Whether ``node`` may be a step on the way from scores to a map."""
    if not is_tensor(node) or node.op != "call_function":
        return False
    return op_name(node) not in PRODUCTS and op_name(node) not in ("attention", "weigh", "linear", "embedding")


def _has_scores(node: fx.Node) -> bool:
    """Whether a product of queries and keys is among what ``node`` is computed from, with as many keys."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if op_name(node) in PRODUCTS:
            return True
        for operand in node.all_input_nodes if _is_step(node) else ():
            if operand not in seen and is_tensor(operand) and _is_like(operand, example_shape(node)):
                seen.add(operand)
                waiting.append(operand)
    return False


def _region(product: fx.Node) -> Region | None:
    """The map that ``product`` weighs values by; None if its first operand is no map: made by a softmax over its last
    dimension."""
    weights: Any = product.args[0]
    if op_name(product) == "baddbmm" or not all(is_tensor(n) for n in product.args[:2]):
        return None
    shape = example_shape(weights)
    if len(shape) not in (3, 4) or len(example_shape(product.args[1])) != len(shape):  # type: ignore[arg-type]
        return None
    found = Region(product)
    waiting, seen = [weights], {weights}
    while waiting:
        node = waiting.pop()
        name = op_name(node)
        if node.op != "call_function" or name in PRODUCTS or name == "attention":
            continue
        if name == "shares" and example_shape(node)[-2:] == shape[-2:]:
            found.shared = True
        elif name == "softmax" and _over_keys(node, node, shape):
            found.softmaxes.append(node)
        elif name == "sum" and _over_keys(node, node.args[0], shape):
            found.sums.append(node)
        elif name in SOFTMAXES:
            return None
        for operand in node.all_input_nodes:
            if operand not in seen and is_tensor(operand) and (_is_like(operand, shape) or _is_row(operand, shape)):
                seen.add(operand)
                waiting.append(operand)
    return found if found.softmaxes or found.shared else None


def _over_keys(node: fx.Node, values: Any, shape: tuple[int, ...]) -> bool:
    """Whether ``node`` mixes the last dimension of ``values``, which are a map."""
    dims = call_argument(node, 1, "dim", None)
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    own = example_shape(values)
    last = len(dims) == 1 and isinstance(dims[0], int) and normal_dim(dims[0], len(own)) == len(own) - 1
    return last and own[-2:] == shape[-2:]


def _is_like(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether ``node`` may be the map in another order of dimensions, with other heads."""
    own = list(example_shape(node))
    for size in shape[-2:]:
        if size not in own:
            return False
        own.remove(size)
    return True


def _is_row(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether ``node`` may hold one number for each query: a sum over the keys."""
    return op_name(node) in ("sum", "unsqueeze", "clamp", "clamp_min", "add") and shape[-2] in example_shape(node)


def _replace(graph: fx.Graph, region: Region) -> None:
    scores: Any = next((n.args[0] for n in region.softmaxes if not is_learned(n)), None)
    if scores is not None and any(is_learned(n) and any(u < scores for u in n.users) for n in region.softmaxes):
        raise AxisError("a softmax over parameters that is read before there are scores")
    product = region.product
    weights: Any = product.args[0]
    values: Any = product.args[1]
    with graph.inserting_before(product):
        folded = len(example_shape(weights)) == 3
        if folded:
            heads = folded_heads(values)
            weights, values = (unfold_heads(graph, n, heads) for n in (weights, values))
        new = emit(graph, weigh, (weights, values), product)
        result = fold_heads(graph, new) if folded else new
    if example_shape(result) != example_shape(product):
        raise AxisError("a product that broadcasts")
    product.replace_all_uses_with(result)
    graph.erase_node(product)
    for node in region.softmaxes:
        _share(graph, node, scores)
    for node in region.sums:
        with graph.inserting_before(node):
            keepdim = len(example_shape(node)) == len(example_shape(node.args[0]))  # type: ignore[arg-type]
            _swap(graph, node, emit(graph, total, (node.args[0], keepdim), node))


def _share(graph: fx.Graph, node: fx.Node, scores: Any) -> None:
    """A softmax as a node of its own. One over parameters alone runs along the tokens of the other scores, so that it, too, is
    over the keys that are left."""
    own: Any = node.args[0]
    along = scores is not None and is_learned(node)
    with graph.inserting_after(scores) if along and node < scores else graph.inserting_before(node):
        new = emit(graph, shares, (own, call_argument(node, 2, "dtype", None)), node)
        if along:
            with graph.inserting_before(new):
                new.update_arg(0, emit(graph, aten.expand_as.default, (own, scores), node))
    _swap(graph, node, new)


def _swap(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    graph.erase_node(node)
