"""Norms spelled out: ``x * rsqrt(mean(x ** 2) + eps) * weight`` and ``(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps)``,
scaled and shifted or not, become one node, as torch's own modules are.

Start at :func:`canonical_norms`. Later stages tell a post-norm block by its norm and need to see it. A norm computed in a wider
type stays in it: what is cast behind it, a weight too, is not part of the node.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import fx
from torch.fx.node import Argument

from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, example_shape, is_tensor, op_name
from rewriters.graph.op_sets import SAME_VALUES

aten = torch.ops.aten


def canonical_norms(graph: fx.Graph) -> None:
    """Replace every root-mean-square norm and layer norm in place; what does not fit keeps its spelling."""
    spellings = {"rsqrt": _replace_rms, "sqrt": _replace_layer}
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in spellings:
            with suppress(AxisError):
                spellings[op_name(node)](graph, node)


@dataclass(frozen=True)
class _Statistic:
    """What a norm divides by: ``mean(x ** 2) + epsilon``, before its root."""

    x: fx.Node
    epsilon: float


@dataclass(frozen=True)
class _Affine:
    """The last node of a norm, and the parameter that it multiplies by or adds; None if it does neither."""

    last: fx.Node
    parameter: fx.Node | None


def _replace_layer(graph: fx.Graph, root: fx.Node) -> None:
    found, scaled = _statistic(root), _only_user(root)
    if found is None or scaled is None or not _is(scaled, "div") or scaled.args[1] is not root or scaled.kwargs:
        return
    x = _centred(found.x)
    if x is None or _centred(scaled.args[0]) is not x:
        return
    shape = example_shape(x)[-1:]
    weighted = _affine(scaled, "mul", shape)
    shifted = _affine(weighted.last, "add", shape)
    last = shifted.last
    if len({n.meta["val"].dtype for n in (x, root, scaled, last)}) != 1:
        return
    arguments = (x, list(shape), weighted.parameter, shifted.parameter, found.epsilon)
    with graph.inserting_before(last):
        new = emit(graph, aten.layer_norm.default, arguments, last)
    last.replace_all_uses_with(new)


def _centred(node: Argument) -> fx.Node | None:
    """x of ``x - mean(x, -1, keepdim)``; None if ``node`` is anything else."""
    if not _is(node, "sub") or node.kwargs:
        return None
    x, mean = node.args
    if not is_tensor(x) or not _is(mean, "mean") or mean.args[0] is not x:
        return None
    return x if _is_over_last(mean, x) else None


def _is_over_last(mean: fx.Node, values: fx.Node) -> bool:
    """Whether a mean is one of the last dimension, which it keeps."""
    over_last = mean.args[1:2] in (([-1],), ([len(example_shape(values)) - 1],))
    return over_last and len(mean.args) > 2 and mean.args[2] is True and not mean.kwargs


def _affine(node: fx.Node, how: str, shape: tuple[int, ...]) -> _Affine:
    """What the only user of ``node`` does with a parameter of ``shape``, if it does ``how``."""
    user = _only_user(node)
    if user is None or not _is(user, how) or user.kwargs:
        return _Affine(node, None)
    other = _other(user, node)
    fits = is_tensor(other) and other.op == "get_attr" and example_shape(other) == shape
    return _Affine(user, other) if fits and isinstance(other, fx.Node) else _Affine(node, None)


def _replace_rms(graph: fx.Graph, root: fx.Node) -> None:
    found, scaled = _statistic(root), _only_user(root)
    if found is None or scaled is None or op_name(scaled) != "mul" or _other(scaled, root) is not found.x:
        return
    x = found.x
    shape = example_shape(x)[-1:]
    weighted = _affine(_past_casts(scaled), "mul", shape)
    last = scaled if weighted.parameter is None else weighted.last
    if len({n.meta["val"].dtype for n in (x, root, scaled, last)}) != 1:
        return
    with graph.inserting_before(last):
        new = emit(graph, aten.rms_norm.default, (x, list(shape), weighted.parameter, found.epsilon), last)
    last.replace_all_uses_with(new)


def _statistic(root: fx.Node) -> _Statistic | None:
    """x and epsilon of ``rsqrt(mean(x ** 2, -1, keepdim) + epsilon)``, or of ``sqrt``."""
    added = root.args[0]
    if not _is(added, "add") or added.kwargs:
        return None
    mean, epsilon = added.args
    if not _is(mean, "mean") or not isinstance(epsilon, (int, float)):
        return None
    x = _squared(mean.args[0])
    return None if x is None or not _is_over_last(mean, x) else _Statistic(x, float(epsilon))


def _squared(square: Argument) -> fx.Node | None:
    """x of ``x ** 2`` in any spelling; None if ``square`` is anything else."""
    powers = _is(square, "pow") and square.args[1] == 2
    itself = _is(square, "mul") and square.args[0] is square.args[1]
    if not isinstance(square, fx.Node) or not (powers or itself or _is(square, "square")):
        return None
    x = square.args[0]
    return x if is_tensor(x) else None


def _is(node: Argument, name: str) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == name


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(product: fx.Node, one: fx.Node) -> Argument:
    """The operand beside ``one``."""
    first, second = product.args[:2]
    return second if first is one else first


def _past_casts(node: fx.Node) -> fx.Node:
    """``node``, past casts and copies that change neither value nor type."""
    while True:
        user = _only_user(node)
        if user is None or op_name(user) not in SAME_VALUES or user.meta["val"].dtype != node.meta["val"].dtype:
            return node
        node = user
