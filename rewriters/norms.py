"""Norms spelled out: ``x * rsqrt(mean(x ** 2) + eps) * weight`` becomes one node, as torch's own module is.

Start at :func:`canonical_norms`. Later stages tell a post-norm block by its norm and need to see it. A norm computed in a wider
type stays in it: what is cast behind it, a weight too, is no part of the node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriters.axes import AxisError, example_shape, is_tensor
from rewriters.outcomes import op_name
from rewriters.spellings import emit

aten = torch.ops.aten
UNCHANGED = frozenset("to _to_copy type_as float alias".split())


def canonical_norms(graph: fx.Graph) -> None:
    """Replace every root-mean-square norm in place; what does not fit keeps its spelling."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "rsqrt":
            try:
                _replace(graph, node)
            except AxisError:
                continue


def _replace(graph: fx.Graph, root: fx.Node) -> None:
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
    """x and eps of ``rsqrt(mean(x ** 2, -1, keepdim) + eps)``."""
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
