"""Pricing: the cost table of a graph with its sites inserted.

Start at :func:`cost_table`. Every operation that multiplies and accumulates becomes one term over symbolic sizes and
the token axes that its dimensions run along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from madtp.cost.table import CostTable, CostTerm, Join, Part, Range
from rewriters.axes.labels import Dim, Labels, axes_of, unlabelled
from rewriters.axes.outcome import labels_of
from rewriters.capture.export import Capture
from rewriters.graph.node_record import record, rowwise_module
from rewriters.graph.nodes import AxisError, is_tensor, module_path, op_name
from rewriters.insert.workspace import Insertion, site_key

NORM_COST = {"layer_norm": 5, "group_norm": 5, "rms_norm": 5, "batch_norm": 2}


def cost_table(done: Insertion, capture: Capture) -> CostTable:
    """All terms of the graph, before lifting."""
    table = CostTable(symbols=_symbols(capture))
    _record_sites(table, done)
    for node in done.graph.nodes:
        if node.op == "call_module" and record(node).site_attention:
            labels = [labels_of(n, done.labels) for n in node.args[:3]]
            table.terms.extend(_attention(node, node.args[:3], labels))
        elif node.op == "call_function":
            rule = TERMS.get(op_name(node))
            if rule is not None:
                table.terms.append(rule(node, done))
            elif op_name(node) == "attention":
                labels = [labels_of(n, done.labels) for n in node.args[:3]]
                table.terms.extend(_attention(node, node.args[:3], labels))
    return table


def _symbols(capture: Capture) -> dict[Any, tuple[int, int]]:
    found: dict[Any, tuple[int, int]] = {}
    placeholders = [n for n in capture.graph.nodes if n.op == "placeholder"]
    for leaf, node in enumerate(placeholders):
        if not is_tensor(node):
            continue
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, (leaf, dim))
    return found


def _record_sites(table: CostTable, done: Insertion) -> None:
    for site in done.plan.sites:
        value, _ = done.before_site[site.name]
        shape = value.meta["val"].shape
        root = done.labels.chain(site.name)[-1]
        if root == site.name or isinstance(root, tuple):
            table.lengths[site.name] = (_size(shape[site.token_dim]), _size(shape[site.batch_dim]))
        else:
            table.lengths[site.name] = table.lengths[root]
        before = done.labels.parent.get(site.name)
        before = ("before", site.name) if before is None else before
        path = f"madtp.sites.{site_key(site.name)}"
        # The projection is applied to the alignment tokens, once a forward, rather than to the tokens.
        table.terms.append(CostTerm(path, "query", 1, ("alignment_tokens", f"projection of {site.width}"), (), True))
        table.terms.append(CostTerm(path, "guidance", site.width, ("alignment_tokens",), (before,), True))
    for source, (node, part) in done.derived.items():
        if source[1] != "part":
            continue
        dim = _batch_dim(node, done)
        total = _example(node.args[0].meta["val"].shape[dim])  # type: ignore[union-attr]
        if op_name(node) == "repeat_interleave":
            table.parts[source] = Part(source[0], 0.0, 1.0, times=node.args[1])  # type: ignore[arg-type]
            continue
        if op_name(node) == "slice":
            start = node.args[2] if len(node.args) > 2 else 0
            first = start if isinstance(start, int) else _example(start.meta["val"])  # type: ignore[union-attr]
            last = first + _example(node.meta["val"].shape[dim])
        else:
            sizes = [_example(v.shape[dim]) for v in node.meta["val"]]
            first, last = sum(sizes[:part]), sum(sizes[: part + 1])
        table.parts[source] = Part(source[0], first / total, last / total)
    for source in done.states:
        if not isinstance(source, tuple):
            continue
        if source[1] == "rest":
            table.parts[source] = Part(source[0], 0.0, 1.0, source[2])
        elif source[1] == "range":
            table.ranges[source] = Range(source[0], *(_bound(b) for b in source[2:]))
        elif source[1] == "join":
            table.joins[source] = Join(source[0], tuple(_size(n) for n in done.joined[source]))


def _batch_dim(node: fx.Node, done: Insertion) -> int:
    labels = labels_of(node.args[0], done.labels)
    return next(d for d, dim in enumerate(labels) if any(a.kind == "batch" for a in axes_of(dim)))


def _bound(bound: Any) -> Any:
    return _size(bound.meta["val"]) if isinstance(bound, fx.Node) else bound


def _example(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _term(node: fx.Node, kind: str, constant: float, dims: Sequence[tuple[Dim, Any]]) -> CostTerm:
    """A term from dimensions given as labels and (symbolic) sizes."""
    axes = [a.source for dim, _ in dims for a in axes_of(dim) if a.kind == "tokens"]
    sizes: list[Any] = []
    for dim, size in dims:
        if not axes_of(dim):
            sizes.append(_size(size))
        elif axes:
            constant *= math.prod(f.size for f in dim if f.axis is None)
        else:
            sizes.append(_size(size))
    numbers = [s for s in sizes if isinstance(s, int)]
    constant *= math.prod(numbers)
    symbols = tuple(s for s in sizes if not isinstance(s, int))
    # Computed once more for all tokens, beside the survivors: without pruning the same values, not counted twice.
    again = record(node).recomputed
    return CostTerm(module_path(node), kind, constant, symbols, tuple(axes), again is not None and bool(again.users))


def _dims(node: fx.Node, labels: Labels) -> list[tuple[Dim, Any]]:
    return list(zip(labels, node.meta["val"].shape, strict=True))


def _linear(node: fx.Node, done: Insertion) -> CostTerm:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    labels = labels_of(node, done.labels)
    return _term(
        node, "linear", operand.meta["val"].shape[-1] if "val" in operand.meta else _weight(node), _dims(node, labels)
    )


def _weight(node: fx.Node) -> int:
    return int(node.args[1].meta["val"].shape[-1])  # type: ignore[union-attr]


def _matmul(node: fx.Node, done: Insertion) -> CostTerm:
    first = node.args[1] if op_name(node) in ("addmm", "baddbmm") else node.args[0]
    assert isinstance(first, fx.Node)
    inner = (labels_of(first, done.labels)[-1], first.meta["val"].shape[-1])
    return _term(node, "matmul", 1, [*_dims(node, labels_of(node, done.labels)), inner])


def _convolution(node: fx.Node, done: Insertion) -> CostTerm:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return _term(
        node, "convolution", math.prod(weight.meta["val"].shape[1:]), _dims(node, labels_of(node, done.labels))
    )


def _norm(node: fx.Node, done: Insertion) -> CostTerm:
    name = op_name(node)
    affine = any(isinstance(a, fx.Node) for a in node.args[1:])
    cost = NORM_COST[name] - (0 if affine else 1)
    return _term(node, "norm", cost, _dims(node, labels_of(node, done.labels)))


def _attention(node: fx.Node, operands: Sequence[Any], labels: list[Labels]) -> list[CostTerm]:
    query, key, value = operands
    shapes = [n.meta["val"].shape for n in (query, key, value)]
    batch = labels[0][0] if axes_of(labels[0][0]) else labels[1][0]
    common = [
        (batch, shapes[0][0]),
        (labels[0][1], shapes[0][1]),
        (labels[0][2], shapes[0][2]),
        (labels[1][2], shapes[1][2]),
    ]
    return [
        _term(node, "attention", 1, [*common, (labels[0][3], shapes[0][3])]),
        _term(node, "attention", 1, [*common, (labels[2][3], shapes[2][3])]),
    ]


def _weighing(node: fx.Node, done: Insertion) -> CostTerm:
    weights = node.args[0]
    assert isinstance(weights, fx.Node)
    keys = (labels_of(weights, done.labels)[-1], weights.meta["val"].shape[-1])
    return _term(node, "attention", 1, [*_dims(node, labels_of(node, done.labels)), keys])


def _rowwise(node: fx.Node, done: Insertion) -> CostTerm:
    form = rowwise_module(node)
    labels: Any = done.labels.get(node)
    sizes = node.meta["val"][0].shape[: form.rank]
    rows = unlabelled([_example(n) for n in sizes]) if labels is None else labels[0][: form.rank]
    return _term(node, "rows", form.macs, list(zip(rows, sizes, strict=True)))


TERMS: dict[str, Callable[[fx.Node, Insertion], CostTerm]] = {
    "linear": _linear,
    "weigh": _weighing,
    "rowwise": _rowwise,
    **dict.fromkeys(("matmul", "bmm", "addmm", "baddbmm", "mm"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(NORM_COST, _norm),
}

__all__ = ["AxisError", "cost_table"]
