"""Spellings of attention: scaled_dot_product_attention, and matmul, scale, mask, softmax, matmul in their variants.

Start at :func:`canonical_attention`. Each softmax is read outwards to the product with the values and inwards to the
product of queries and keys; scale factors and masks met on the way become operands of one attention node. A softmax
that does not fit is left as it is (``detect`` then knows no attention there), so a near miss costs a site, never
correctness.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from madtp.tokens.attention import HIDDEN, attention
from rewriters.canonicalise.attention_masks import Mask, fold_mask, join, unfold_mask
from rewriters.canonicalise.attention_windows import fold_windows, unfold_windows, windows_beside
from rewriters.graph.emit import emit
from rewriters.graph.node_record import record
from rewriters.graph.nodes import AxisError, example_shape, is_tensor, op_name

aten = torch.ops.aten
PASS_THROUGH = frozenset("to _to_copy type_as float contiguous clone alias detach".split())
# Results of an operation that parts queries, keys and values.
PARTS = frozenset(("getitem", "unbind", "select", "chunk", "split"))
RESHAPES = frozenset("view reshape _unsafe_view unflatten flatten".split())
PRODUCTS = frozenset("matmul bmm baddbmm".split())
SOFTMAXES = frozenset(("softmax", "_softmax", "_safe_softmax"))


class NoMatch(Exception):
    """This softmax is not attention of a known spelling."""


@dataclass
class Scores:
    """What was found between the product of queries and keys and the softmax.

    scale: of the product. softcap: c of ``c * tanh(scale * product)``, which the masks are added to; None without a cap.
    """

    product: fx.Node
    scale: float = 1.0
    softcap: float | None = None
    masks: list[Mask] = field(default_factory=list)
    query_factors: list[fx.Node] = field(default_factory=list)


def canonical_attention(graph: fx.Graph) -> None:
    """Replace every recognised spelling in place."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if op_name(node) == "scaled_dot_product_attention":
            with suppress(AxisError):
                _from_sdpa(graph, node)
        elif op_name(node) in SOFTMAXES:
            with suppress(NoMatch, AxisError):
                _from_softmax(graph, node)


def _from_sdpa(graph: fx.Graph, node: fx.Node) -> None:
    arguments: dict[str, Any] = dict(
        zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)
    )
    arguments |= node.kwargs
    rank = len(example_shape(node))
    with graph.inserting_before(node):
        operands = [arguments[name] for name in ("query", "key", "value")]
        mask = arguments.get("attn_mask")
        if rank == 3:
            heads = folded_heads(operands[0])
            operands = [unfold_heads(graph, n, heads) for n in operands]
            mask = None if mask is None else unfold_mask(graph, mask, heads, node, rank)
        elif rank == 5 and mask is None:
            beside = windows_beside(operands)
            operands = [fold_windows(graph, n, beside[0]) for n in operands]
        elif rank != 4:
            return
        new = emit(
            graph,
            attention,
            (*operands, mask, arguments.get("dropout_p", 0.0), arguments.get("is_causal", False)),
            node,
            scale=arguments.get("scale"),
            grouped=arguments.get("enable_gqa", False),
        )
        result = fold_heads(graph, new) if rank == 3 else new
        if rank == 5:
            result = unfold_windows(graph, new, beside[1], beside[0])
    result.meta |= {k: v for k, v in node.meta.items() if k != "val"}
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _from_softmax(graph: fx.Graph, softmax: fx.Node) -> None:
    dim = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    if dim not in (-1, len(example_shape(softmax)) - 1):
        raise NoMatch
    product, dropout = _outwards(softmax)
    scores = _inwards(softmax.args[0])
    operands: tuple[Any, ...] = (scores.product.args[-2], scores.product.args[-1], product.args[1])
    query, key, value = operands
    if not all(is_tensor(n) for n in (query, key, value)):
        raise NoMatch
    rank = len(example_shape(product))
    shapes = [example_shape(n) for n in (query, key, value)]
    if rank not in (3, 4, 5) or any(len(s) != rank for s in shapes) or shapes[1][-1] != shapes[2][-2]:
        raise NoMatch
    with graph.inserting_before(product):
        key = emit(graph, aten.transpose.int, (key, -1, -2), product)
        for factor in scores.query_factors:
            query = emit(graph, aten.mul.Tensor, (query, factor), product)
        if rank == 3:
            heads = folded_heads(query)
            query, key, value = (unfold_heads(graph, n, heads) for n in (query, key, value))
            masks = [replace(m, node=unfold_mask(graph, m.node, heads, product, m.rank)) for m in scores.masks]
        elif rank == 5:
            if scores.masks:
                raise NoMatch
            masks = []
            beside = windows_beside([query, key, value])
            query, key, value = (fold_windows(graph, n, beside[0]) for n in (query, key, value))
        else:
            masks = [replace(m, node=fold_mask(graph, m, query, product)) for m in scores.masks]
        mask = join(graph, masks, product, query.meta["val"].dtype)
        cap: dict[str, float] = {} if scores.softcap is None else {"softcap": scores.softcap}
        scale = scores.scale * cap.get("softcap", 1.0)
        new = emit(
            graph, attention, (query, key, value, mask, dropout, False), product, scale=scale, grouped=False, **cap
        )
        result = fold_heads(graph, new) if rank == 3 else new
        if rank == 5:
            result = unfold_windows(graph, new, beside[1], beside[0])
        wanted = product.meta["val"].dtype
        if result.meta["val"].dtype != wanted:
            result = emit(graph, aten.to.dtype, (result, wanted), product)
    product.replace_all_uses_with(result)


def looks_like_attention(node: fx.Node) -> bool:
    """Whether ``node`` is a softmax whose probabilities weigh something: attention in a spelling that is not known."""
    if op_name(node) not in SOFTMAXES:
        return False
    frontier = list(node.users)
    while frontier:
        user = frontier.pop()
        name = op_name(user)
        if name in PRODUCTS or name == "einsum":
            return True
        if name == "dropout" or name in PASS_THROUGH or name in RESHAPES:
            frontier.extend(user.users)
    return False


def _outwards(softmax: fx.Node) -> tuple[fx.Node, float]:
    """The product of probabilities and values, and the dropout on the way."""
    node, dropout = softmax, 0.0
    while True:
        users = [u for u in node.users if not _is_only_returned(u)]
        if len(users) != 1:
            raise NoMatch
        user = users[0]
        name = op_name(user)
        if name in PRODUCTS and user.args[0] is node and name != "baddbmm":
            return user, dropout
        if name == "dropout" and isinstance(user.args[1], float):
            dropout = user.args[1] if user.args[2] else 0.0
        elif name not in PASS_THROUGH and name not in RESHAPES and name != "expand":
            raise NoMatch
        node = user


def _is_only_returned(node: fx.Node) -> bool:
    """Whether ``node`` serves the outputs of the graph alone: attention maps that a model hands out."""
    if node.op == "output":
        return True
    passed = op_name(node) == "dropout" or op_name(node) in PASS_THROUGH or op_name(node) in RESHAPES
    return passed and bool(node.users) and all(map(_is_only_returned, node.users))


def _inwards(value: Any) -> Scores:
    """Walk from the softmax to the product of queries and keys, collecting scale and masks."""
    if not is_tensor(value) or value.op != "call_function":
        raise NoMatch
    node: Any = value
    name = op_name(node)
    if name in PRODUCTS:
        return _product(node)
    if name in PASS_THROUGH or name in RESHAPES:
        return _inwards(node.args[0])
    if name in ("mul", "div"):
        return _scaled(node, name)
    if name == "tanh":
        return _capped(node)
    if name == "add" and not node.kwargs:
        return _masked_sum(node)
    if name == "sub" and not node.kwargs:
        inner = _inwards(node.args[0])
        if not _is_shift(node.args[1], node):
            inner.masks.append(Mask("add", node.args[1], example_shape(node), times=-1.0))
        return inner
    if name in ("masked_fill", "where"):
        hidden = constant_number(node.args[2])
        if hidden is None or hidden > HIDDEN:
            raise NoMatch
        kind, scores, mask = ("hide", *node.args[:2]) if name == "masked_fill" else ("show", *node.args[1::-1])
        inner = _inwards(scores)
        inner.masks.append(Mask(kind, mask, example_shape(node), hidden=hidden))
        return inner
    raise NoMatch


def _is_shift(value: Any, scores: fx.Node) -> bool:
    """Whether ``value`` is one number for all keys of a query, which a softmax does not feel."""
    if not is_tensor(value):
        return isinstance(value, (int, float))
    shape = example_shape(value)
    return (not shape or shape[-1] == 1) and example_shape(scores)[-1] > 1


def _product(node: fx.Node) -> Scores:
    if op_name(node) != "baddbmm":
        return Scores(node)
    beta, alpha = float(node.kwargs.get("beta", 1)), float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    found = Scores(node, scale=alpha)
    if beta == 1:
        found.masks.append(Mask("add", node.args[0], example_shape(node)))  # type: ignore[arg-type]
    elif beta != 0:
        raise NoMatch
    return found


def _capped(node: fx.Node) -> Scores:
    inner = _inwards(node.args[0])
    if inner.masks or inner.softcap is not None:
        raise NoMatch
    return replace(inner, softcap=1.0)


def _scaled(node: fx.Node, name: str) -> Scores:
    inner = _inwards(node.args[0])
    operand: Any = node.args[1]
    factor = constant_number(operand)
    if factor is None:
        shape = example_shape(operand) if is_tensor(operand) else ()
        one_a_head = name == "mul" and shape[-2:] == (1, 1)
        if not one_a_head or inner.masks or inner.scale != 1.0 or inner.softcap is not None:
            raise NoMatch
        inner.query_factors.append(operand)
        return inner
    factor = 1 / factor if name == "div" else factor
    if inner.softcap is None:
        inner.scale *= factor
    elif factor == 0:
        raise NoMatch
    else:
        inner.softcap *= factor
    inner.masks = [replace(m, times=m.times * factor) if m.kind == "add" else m for m in inner.masks]
    return inner


def _masked_sum(node: fx.Node) -> Scores:
    for scores, mask in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        try:
            inner = _inwards(scores)
        except NoMatch:
            continue
        if isinstance(mask, (int, float)):
            return inner
        inner.masks.append(Mask("add", mask, example_shape(node)))  # type: ignore[arg-type]
        return inner
    raise NoMatch


def constant_number(value: Any) -> float | None:
    """A Python number, or the value of a scalar constant of the graph."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return record(value).number
    if isinstance(value, fx.Node) and value.op == "call_function":
        name = op_name(value)
        if name in ("full", "scalar_tensor"):
            position = 1 if name == "full" else 0
            number = value.args[position]
            return float(number) if isinstance(number, (int, float)) else None
        if name in PASS_THROUGH or name in ("lift_fresh_copy", "expand"):
            return constant_number(value.args[0])
    return None


def folded_heads(query: fx.Node) -> int:
    """Heads that are folded into the batch of ``[B * H, N, D]``, read off the view that folded them; 1 if none did."""
    width = example_shape(query)[-1]
    node: Any = query
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = op_name(node)
        if name in RESHAPES:
            shape = example_shape(node.all_input_nodes[0])
            if len(shape) == len(example_shape(node)) + 1 and example_shape(node)[-3] == math.prod(shape[-4:-2]):
                return shape[-3]
            if len(shape) == 4:
                return shape[1]
            return max(1, shape[-1] // width)
        if name not in PASS_THROUGH and name not in ("transpose", "permute", "mul", "div", *PARTS):
            return 1
        node = node.args[0]
    return 1


def unfold_heads(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """``[B * H, N, D]`` as ``[B, H, N, D]``."""
    if heads == 1:
        return emit(graph, aten.unsqueeze.default, (node, 1), node)
    return emit(graph, aten.unflatten.int, (node, 0, [-1, heads]), node)


def fold_heads(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``[B, H, N, D]`` as ``[B * H, N, D]``."""
    return emit(graph, aten.flatten.using_ints, (node, 0, 1), node)
