"""Pricing: the cost table of a graph with its sites inserted.

Start at :func:`cost_table`. Every operation that multiplies and accumulates becomes one term over symbolic sizes and
the token axes that its dimensions run along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch import fx

from madtp.cost.counts import (
    BatchPartCount,
    ConcatenationCount,
    FullCount,
    RangeCount,
    RepeatedCount,
    RestCount,
    SiteCount,
    StreamSize,
    TokenCount,
)
from madtp.cost.counts import Size as CostSize
from madtp.cost.table import CostTable, CostTerm, InputSize
from rewriters.axes.labels import Dim, ResultLabels, axes_of, unlabelled
from rewriters.axes.sources import BatchPart, Bound, Concatenation, Rest, Source, TokenRange
from rewriters.capture.export import Capture
from rewriters.graph.node_record import record, rowwise_module
from rewriters.graph.nodes import call_argument, example_size, int_argument, is_tensor, module_path, op_name, operand
from rewriters.insert.stream_starts import is_start
from rewriters.insert.workspace import Insertion, Size, site_key

NORM_COST = {"layer_norm": 5, "group_norm": 5, "rms_norm": 5, "batch_norm": 2}


def cost_table(insertion: Insertion, capture: Capture) -> CostTable:
    """All terms of the graph, before lifting."""
    table = CostTable(symbols=_symbols(capture))
    _record_sites(table, insertion)
    for node in insertion.graph.nodes:
        if node.op == "call_module" and record(node).site_attention:
            table.terms.extend(_attention(insertion, node))
        elif node.op == "call_function":
            rule = TERMS.get(op_name(node))
            if rule is not None:
                table.terms.append(rule(insertion, node))
            elif op_name(node) == "attention":
                table.terms.extend(_attention(insertion, node))
    return table


def _symbols(capture: Capture) -> dict[sympy.Symbol, InputSize]:
    found: dict[sympy.Symbol, InputSize] = {}
    placeholders = [n for n in capture.graph.nodes if n.op == "placeholder"]
    for leaf, node in enumerate(placeholders):
        if not is_tensor(node):
            continue
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, InputSize(leaf, dim))
    return found


def _record_sites(table: CostTable, insertion: Insertion) -> None:
    for name, inserted in insertion.sites.items():
        if is_start(name):
            batch, length, _ = inserted.value.meta["val"].shape
            table.streams[name] = StreamSize(_size(length), _size(batch))
    for site in insertion.plan.sites:
        shape = insertion.sites[site.name].value.meta["val"].shape
        root = insertion.labels.chain(site.name)[-1]
        if isinstance(root, str) and root != site.name:
            table.streams[site.name] = table.streams[root]
        else:
            table.streams[site.name] = StreamSize(_size(shape[site.token_dim]), _size(shape[site.batch_dim]))
        previous = insertion.labels.parent.get(site.name)
        before = FullCount(site.name) if previous is None else token_count(insertion, previous)
        path = f"madtp.sites.{site_key(site.name)}"
        # The projection is applied to the alignment tokens, once a forward, rather than to the tokens.
        projection = ("alignment_tokens", f"projection of {site.width}")
        table.terms.append(CostTerm(path=path, constant=1, sizes=projection, only_active=True, guidance=True))
        table.terms.append(
            CostTerm(
                path=path,
                constant=site.width,
                sizes=("alignment_tokens",),
                axes=(before,),
                only_active=True,
                guidance=True,
            )
        )


def token_count(insertion: Insertion, source: Source) -> TokenCount:
    """The formula for the tokens along the axis of ``source``."""
    match source:
        case str():
            return SiteCount(source)
        case Rest(parent, start):
            return RestCount(token_count(insertion, parent), start)
        case TokenRange(parent, start, end):
            return RangeCount(token_count(insertion, parent), _bound_size(start), _bound_size(end))
        case Concatenation(parents):
            counts = (None if parent is None else token_count(insertion, parent) for parent in parents)
            return ConcatenationCount(tuple(counts), tuple(map(_size, insertion.part_sizes[source])))
        case BatchPart(parent):
            return _batch_part_count(insertion, source, token_count(insertion, parent))
    raise TypeError(f"{source!r} is not a site, and not derived from one")


def _batch_part_count(insertion: Insertion, source: BatchPart, parent: TokenCount) -> TokenCount:
    node, number = insertion.batch_cuts[source].node, insertion.batch_cuts[source].number
    if op_name(node) == "repeat_interleave":
        return RepeatedCount(parent, int_argument(node, 1, "repeats"))
    whole = operand(node, 0)
    dim = insertion.labels.of(whole).batch_dim()
    total = example_size(whole.meta["val"].shape[dim])
    if op_name(node) == "slice":
        start = call_argument(node, 2, "start", None) or 0
        first = example_size(start.meta["val"] if isinstance(start, fx.Node) else start)
        last = first + example_size(node.meta["val"].shape[dim])
    else:
        sizes = [example_size(v.shape[dim]) for v in node.meta["val"]]
        first, last = sum(sizes[:number]), sum(sizes[: number + 1])
    return BatchPartCount(parent, first / total, last / total)


def _bound_size(bound: Bound) -> CostSize | None:
    return _size(bound.meta["val"]) if isinstance(bound, fx.Node) else bound


def _size(size: Size) -> CostSize:
    """A size of the captured graph as the cost table holds it."""
    if isinstance(size, int):
        return size
    expression: sympy.Expr = size.node.expr
    return expression


def _term(insertion: Insertion, node: fx.Node, constant: float, dims: Iterable[tuple[Dim, Size]]) -> CostTerm:
    """A term from dimensions given as labels and (symbolic) sizes."""
    dims = list(dims)
    sources = [a.source for dim, _ in dims for a in axes_of(dim) if a.kind == "tokens"]
    sizes: list[CostSize] = []
    for dim, size in dims:
        if axes_of(dim) and sources:
            constant *= math.prod(f.size for f in dim if f.axis is None)
        else:
            sizes.append(_size(size))
    # Computed once more for all tokens, beside the survivors: without pruning the same values, not counted twice.
    again = record(node).recomputed
    return CostTerm(
        path=module_path(node),
        constant=constant * math.prod(s for s in sizes if isinstance(s, int)),
        sizes=tuple(s for s in sizes if not isinstance(s, int)),
        axes=tuple(token_count(insertion, source) for source in sources),
        only_active=again is not None and bool(again.users),
    )


def _dims(insertion: Insertion, node: fx.Node) -> list[tuple[Dim, Size]]:
    """Labels and sizes of the dimensions of ``node``."""
    return list(zip(insertion.labels.of(node), node.meta["val"].shape, strict=True))


def _linear(insertion: Insertion, node: fx.Node) -> CostTerm:
    inner = operand(node, 0) if "val" in operand(node, 0).meta else operand(node, 1)
    return _term(insertion, node, inner.meta["val"].shape[-1], _dims(insertion, node))


def _matmul(insertion: Insertion, node: fx.Node) -> CostTerm:
    inner = _dims(insertion, operand(node, 1 if op_name(node) in ("addmm", "baddbmm") else 0))[-1]
    return _term(insertion, node, 1, [*_dims(insertion, node), inner])


def _convolution(insertion: Insertion, node: fx.Node) -> CostTerm:
    weight = operand(node, 1).meta["val"]
    return _term(insertion, node, math.prod(weight.shape[1:]), _dims(insertion, node))


def _norm(insertion: Insertion, node: fx.Node) -> CostTerm:
    affine = any(isinstance(a, fx.Node) for a in node.args[1:])
    cost = NORM_COST[op_name(node)] - (0 if affine else 1)
    return _term(insertion, node, cost, _dims(insertion, node))


def _attention(insertion: Insertion, node: fx.Node) -> list[CostTerm]:
    """The products of queries and keys, and of weights and values."""
    query, key, value = (_dims(insertion, operand(node, i)) for i in range(3))
    batch = query[0][0] if axes_of(query[0][0]) else key[0][0]
    common = [(batch, query[0][1]), query[1], query[2], key[2]]
    windows: Any = node.kwargs.get("windows") or (1,)
    share = sum(n * n for n in windows) / sum(windows) ** 2  # survivors are taken to be spread over the windows
    return [_term(insertion, node, share, [*common, width]) for width in (query[3], value[3])]


def _weighing(insertion: Insertion, node: fx.Node) -> CostTerm:
    keys = _dims(insertion, operand(node, 0))[-1]
    return _term(insertion, node, 1, [*_dims(insertion, node), keys])


def _rowwise(insertion: Insertion, node: fx.Node) -> CostTerm:
    form = rowwise_module(node)
    labels = insertion.labels.get(node)
    sizes = node.meta["val"][0].shape[: form.rank]
    rows = labels[0] if isinstance(labels, ResultLabels) else unlabelled([example_size(n) for n in sizes])
    return _term(insertion, node, form.macs, zip(rows[: form.rank], sizes, strict=True))


TERMS: dict[str, Callable[[Insertion, fx.Node], CostTerm]] = {
    "linear": _linear,
    "weigh": _weighing,
    "rowwise": _rowwise,
    **dict.fromkeys(("matmul", "bmm", "addmm", "baddbmm", "mm"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(NORM_COST, _norm),
}
