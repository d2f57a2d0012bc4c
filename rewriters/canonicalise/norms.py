"""Norms spelled out: ``x * rsqrt(mean(x ** 2) + eps) * weight`` and ``(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps)``,
scaled and shifted or not, become one node, as torch's own modules are.

Start at :func:`canonical_norms`. Later stages tell a post-norm block by its norm and need to see it. A norm computed in a wider
type stays in it: what is cast behind it, a weight too, is no part of the node.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, example_shape, is_tensor, op_name

aten = torch.ops.aten
UNCHANGED = frozenset("to _to_copy type_as float alias".split())


def canonical_norms(graph: fx.Graph) -> None:
    """Replace every root-mean-square norm and layer norm in place; what does not fit keeps its spelling."""
    spellings = {"rsqrt": _replace_rms, "sqrt": _replace_layer}
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in spellings:
            with suppress(AxisError):
                spellings[op_name(node)](graph, node)


def _replace_layer(graph: fx.Graph, root: fx.Node) -> None:
    found, scaled = _squares(root), _only_user(root)
    if found is None or scaled is None or not _is(scaled, "div") or scaled.args[1] is not root or scaled.kwargs:
        return
    (centred, epsilon), over = found, scaled.args[0]
    x = _centred(centred)
    if x is None or _centred(over) is not x:
        return
    shape = example_shape(x)[-1:]
    last, weight = _applied(scaled, "mul", shape)
    last, bias = _applied(last, "add", shape)
    if len({n.meta["val"].dtype for n in (x, root, scaled, last)}) != 1:
        return
    with graph.inserting_before(last):
        new = emit(graph, aten.layer_norm.default, (x, list(shape), weight, bias, epsilon), last)
    last.replace_all_uses_with(new)


def _centred(node: Any) -> fx.Node | None:
    """x of ``x - mean(x, -1, keepdim)``."""
    if not _is(node, "sub") or node.kwargs or not _is(node.args[1], "mean") or not is_tensor(node.args[0]):
        return None
    x, mean = node.args
    over_last = len(mean.args) == 3 and mean.args[1] in ([-1], [len(example_shape(x)) - 1]) and mean.args[2] is True
    return x if mean.args[0] is x and over_last and not mean.kwargs else None


def _applied(node: fx.Node, how: str, shape: tuple[int, ...]) -> tuple[fx.Node, fx.Node | None]:
    """The only user of ``node`` and the parameter of ``shape`` that it adds or multiplies by; ``node`` and None if it does
    neither."""
    user = _only_user(node)
    if user is None or not _is(user, how) or user.kwargs:
        return node, None
    other = _other(user, node)
    return (
        (user, other) if is_tensor(other) and other.op == "get_attr" and example_shape(other) == shape else (node, None)
    )


def _replace_rms(graph: fx.Graph, root: fx.Node) -> None:
    found = _squares(root)
    scaled = _only_user(root)
    if found is None or scaled is None or op_name(scaled) != "mul":
        return
    x, epsilon = found
    if _other(scaled, root) is not x:
        return
    last = scaled
    weight: Any = None
    user = _only_user(_past_casts(scaled))
    if user is not None and op_name(user) == "mul":
        other = _other(user, _past_casts(scaled))
        if is_tensor(other) and other.op == "get_attr" and example_shape(other) == example_shape(x)[-1:]:
            last, weight = user, other
    if len({n.meta["val"].dtype for n in (x, root, scaled, last)}) != 1:
        return
    with graph.inserting_before(last):
        new = emit(graph, aten.rms_norm.default, (x, list(example_shape(x)[-1:]), weight, epsilon), last)
    last.replace_all_uses_with(new)


def _squares(root: fx.Node) -> tuple[fx.Node, float] | None:
    """x and eps of ``rsqrt(mean(x ** 2, -1, keepdim) + eps)``, or of ``sqrt``."""
    added: Any = root.args[0]
    if not _is(added, "add") or added.kwargs or not isinstance(added.args[1], (int, float)):
        return None
    mean = added.args[0]
    if not _is(mean, "mean") or len(mean.args) < 3 or mean.args[2] is not True or mean.kwargs:
        return None
    square = mean.args[0]
    x = _squared(square)
    if x is None or mean.args[1] not in ([-1], [len(example_shape(x)) - 1]):
        return None
    return x, float(added.args[1])


def _squared(square: Any) -> fx.Node | None:
    powers = _is(square, "pow") and square.args[1] == 2
    itself = _is(square, "mul") and square.args[0] is square.args[1]
    if not (powers or itself or _is(square, "square")):
        return None
    return square.args[0] if is_tensor(square.args[0]) else None


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == name


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(product: fx.Node, one: fx.Node) -> Any:
    """The factor beside ``one``."""
    first, second = product.args[:2]
    return second if first is one else first


def _past_casts(node: fx.Node) -> fx.Node:
    """``node``, past casts that change nothing."""
    while True:
        user = _only_user(node)
        if user is None or op_name(user) not in UNCHANGED or user.meta["val"].dtype != node.meta["val"].dtype:
            return node
        node = user
