"""Flatten: residual streams ``[B, H, W, C]`` become streams ``[B, H * W, C]``, and ``[B, C, H, W]`` become ``[B, C, H * W]``.

Start at :func:`flatten_grids`. Pointwise operations (``pointwise.py``) move from the grid to flat tokens. Only
what needs the grid (windows, a convolution, a pad) gets a view of it, so the stream is one like any other and can be pruned.
"""

from __future__ import annotations

import operator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument

from rewriters.axes.slice_rules import reduce
from rewriters.axes.table import RULES
from rewriters.canonicalise.pointwise import FIRST, GRID_VIEWS, LAST, LAST_DIMENSION, Order, grid_around, stands_on
from rewriters.graph.emit import emit
from rewriters.graph.match import NoMatch, attempt
from rewriters.graph.nodes import (
    AxisError,
    call_argument,
    example_shape,
    is_attention,
    is_tensor,
    normal_dim,
    op_name,
    operand,
    permutation,
)
from rewriters.graph.op_sets import SIZED_VIEWS
from rewriters.graph.residual import residual_of

aten = torch.ops.aten


def cancel_permutes(graph: fx.Graph) -> None:
    """Remove a permutation together with the one that undoes it."""
    for node in list(graph.nodes):
        if op_name(node) != "permute" or op_name(operand(node)) != "permute":
            continue
        first = operand(node)
        rank = len(example_shape(node))
        inner, outer = (permutation(n, rank) for n in (first, node))
        if [inner[d] for d in outer] == list(range(rank)):
            node.replace_all_uses_with(operand(first))
            graph.erase_node(node)


def flatten_grids(graph: fx.Graph) -> None:
    """Flatten every residual stream of attention blocks that lies on a grid, in place.

    So is every sum for which a stream of flat tokens returns to its grid (a positional encoding by a convolution).
    """
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        seeds: tuple[fx.Node, ...] = ()
        with suppress(AxisError):
            seeds = _seeds(node)
        if not seeds or any(seed in done for seed in seeds):
            continue
        with attempt(
            node, "a grid [B, H, W, C] or [B, C, H, W] that only operations on each place, and views, lead to"
        ):
            found = grid_around(seeds)
            if found is None:
                reason = "nothing tells which dimension of its grid holds the channels"
                raise NoMatch(
                    seeds[0], reason, "a linear layer or norm of the last dimension, or a convolution of the second"
                )
            done |= found.keys()
            _flatten(graph, _Grid(found, *_entry(found)))


def _seeds(node: fx.Node) -> tuple[fx.Node, ...]:
    """A residual value that may lie on a grid, and what was added to it; none if ``node`` leads to no such value."""
    if is_attention(node):
        residual = residual_of(node)
        return (residual.before, residual.after) if len(example_shape(residual.before)) == 4 else ()
    if op_name(node) != "add" or not is_tensor(node):
        return ()
    for summand in node.args[:2]:
        if is_tensor(summand) and op_name(summand) in GRID_VIEWS and _is_view_of_tokens(summand):
            return summand, node
    return ()


def _is_view_of_tokens(view: fx.Node) -> bool:
    """Whether flat tokens become maps ``[B, C, H, W]``."""
    shape = example_shape(view)
    return len(shape) == 4 and example_shape(view.all_input_nodes[0]) == FIRST.flat(shape)


def _entry(nodes: dict[fx.Node, Order]) -> tuple[fx.Node, Order]:
    """A value of the grid that others are computed from, and how it stands there.

    Raises :class:`AxisError` if there is none.
    """
    size = next(order.grid_size(example_shape(node)) for node, order in nodes.items())
    for node in sorted(nodes):
        for value in node.all_input_nodes:
            order = nodes[node].turned if op_name(node) == "permute" else nodes[node]
            if value not in nodes and is_tensor(value) and stands_on(value, size, order):
                return value, order
    raise AxisError("nothing tells the size of a grid")


@dataclass
class _Grid:
    """Values on one grid, each place of which is computed by itself.

    Attributes:
        nodes: the values and their orders of dimensions.
        entry: a value of the grid that they are computed from.
        entry_order: how it stands there.
        flat: the replacement of a value, with both dimensions of the grid flattened.
    """

    nodes: dict[fx.Node, Order]
    entry: fx.Node
    entry_order: Order
    flat: dict[tuple[fx.Node, Order], fx.Node] = field(default_factory=dict)

    def of(self, node: fx.Node) -> fx.Node:
        """The flat value that replaces ``node``."""
        return self.flat[node, self.nodes[node]]


def _flatten(graph: fx.Graph, grid: _Grid) -> None:
    for node in sorted(grid.nodes):
        with graph.inserting_before(node):
            grid.flat[node, grid.nodes[node]] = _flat(graph, grid, node, grid.nodes[node])
    for node in sorted(grid.nodes, reverse=True):
        for user in list(node.users):
            if user not in grid.nodes:
                _show(graph, grid, node, user)
        if not node.users:
            graph.erase_node(node)


def _flat(graph: fx.Graph, grid: _Grid, node: fx.Node, order: Order) -> fx.Node:
    """A value of the grid over flat tokens."""
    name = op_name(node)
    if name == "permute":
        return emit(graph, aten.transpose.int, (_operand(graph, grid, node.args[0], order.turned), 1, 2), node)
    if name in LAST_DIMENSION or name == "batch_norm":
        return emit(
            graph, node.target, (_operand(graph, grid, node.args[0], order), *node.args[1:]), node, **node.kwargs
        )
    if name == "conv2d":
        column = emit(graph, aten.unsqueeze.default, (_operand(graph, grid, node.args[0], order), -1), node)
        mixed = emit(graph, node.target, (column, *node.args[1:]), node, **node.kwargs)
        flat = emit(graph, aten.squeeze.dim, (mixed, -1), node)
        for view in (column, flat):
            view.meta["nn_module_stack"] = _outside(node)
        return flat
    arguments = fx.map_arg(node.args, lambda n: _operand(graph, grid, n, order))
    # An order of memory is one of four dimensions.
    named = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    return emit(graph, node.target, arguments, node, **named)


def _outside(node: fx.Node) -> dict[str, Any]:
    """The module stack around the module that issued ``node``: it issues one operation, and is lifted for that."""
    stack = node.meta.get("nn_module_stack") or {}
    return dict(list(stack.items())[:-1])


def _operand(graph: fx.Graph, grid: _Grid, value: Argument, order: Order) -> Argument:
    """What takes the place of an operand among flat tokens."""
    if not is_tensor(value):
        return value
    if (value, order) not in grid.flat:
        if value in grid.nodes:
            raise AxisError("a value stands on a grid in two ways")
        if len(example_shape(value)) < 4 - order.first:
            return value
        grid.flat[value, order] = _flat_form(graph, value, order)
    return grid.flat[value, order]


def _flat_form(graph: fx.Graph, value: fx.Node, order: Order) -> fx.Node:
    """A value on the grid, or one for all its positions, with both dimensions of the grid flattened."""
    rank = len(example_shape(value))
    source: Any = value.args[0] if value.op == "call_function" and op_name(value) in GRID_VIEWS else None
    if rank == 4 and is_tensor(source):
        if example_shape(source) == order.flat(example_shape(value)):
            return source
        heads = _heads_together(graph, value, source) if order is LAST else None
        if heads is not None:
            return heads
        sizes = value.args[1]
        if op_name(value) in SIZED_VIEWS and isinstance(sizes, (list, tuple)):
            return emit(graph, aten.reshape.default, (source, _merged(graph, list(sizes), order)), value)
    flat = emit(graph, aten.flatten.using_ints, (value, rank + order.first - 4, rank + order.first - 3), value)
    flat.meta["nn_module_stack"] = _outside(value)
    return flat


def _merged(graph: fx.Graph, sizes: list[Any], order: Order) -> list[Any]:
    """Sizes of a value on the grid as sizes of flat tokens."""
    height, width = sizes[order.first : order.first + 2]
    if -1 in (height, width):
        count: Any = -1
    elif isinstance(height, int) and isinstance(width, int):
        count = height * width
    else:
        count = graph.call_function(operator.mul, (height, width))
        known = [n.meta["val"] if isinstance(n, fx.Node) else n for n in (height, width)]
        count.meta["val"] = known[0] * known[1]
    return [*sizes[: order.first], count, *sizes[order.first + 2 :]]


def _heads_together(graph: fx.Graph, joined: fx.Node, permuted: fx.Node) -> fx.Node | None:
    """The flat form of heads ``[B, heads, H, W, D]`` that are put together to ``[B, H, W, heads * D]``; None if ``joined`` is
    anything else."""
    split = permuted.args[0] if op_name(permuted) == "permute" else None
    if not is_tensor(split) or op_name(split) not in SIZED_VIEWS or op_name(joined) not in SIZED_VIEWS:
        return None
    first: Any = split.args[1]
    last: Any = joined.args[1]
    order = permutation(permuted, len(example_shape(split)))
    at = order[1] if len(order) > 3 else 0
    grid = example_shape(joined)[1:3]
    if order[:1] != (0,) or order[2:3] != (at + 1,) or tuple(first[at : at + 2]) != grid or tuple(last[1:3]) != grid:
        return None
    count = grid[0] * grid[1]
    flat = emit(graph, aten.reshape.default, (split.args[0], [*first[:at], count, *first[at + 2 :]]), split)
    merged = [d - (d > at) for d in order if d != at + 1]
    flat = emit(graph, aten.permute.default, (flat, merged), permuted)
    return emit(graph, aten.reshape.default, (flat, [last[0], count, *last[3:]]), joined)


def _show(graph: fx.Graph, grid: _Grid, node: fx.Node, user: fx.Node) -> None:
    """Give a user that needs the grid a view of it; one that only regroups, counts or reduces it reads the flat tokens."""
    with graph.inserting_before(user):
        new = _read_flat(graph, grid, node, user)
        if new is None:
            user.replace_input_with(node, _on_grid(graph, grid, node))
            return
    user.replace_all_uses_with(new)
    graph.erase_node(user)


def _read_flat(graph: fx.Graph, grid: _Grid, node: fx.Node, user: fx.Node) -> fx.Node | None:
    """What a user of a value on the grid yields, from flat tokens; None if it needs the grid."""
    flat, order, name = grid.of(node), grid.nodes[node], op_name(user)
    if name in GRID_VIEWS and example_shape(user) == example_shape(flat):
        return flat
    if name in SIZED_VIEWS and isinstance(user.args[1], (list, tuple)):
        return emit(graph, aten.reshape.default, (flat, user.args[1]), user)
    if name == "flatten":
        start, end = (
            normal_dim(call_argument(user, i, n, d), 4) for i, n, d in ((1, "start_dim", 0), (2, "end_dim", -1))
        )
        if start > order.first or end < order.first + 1:
            return None
        return flat if end - 1 == start else emit(graph, aten.flatten.using_ints, (flat, start, end - 1), user)
    if name == "sym_size":
        return _size(graph, grid, user.args[1], order, flat)
    if (RULES.get(name) is reduce and _over_grid(user, order)) or _pools_all(user, order):
        target = aten.mean.dim if _pools_all(user, order) else user.target
        keeps = len(example_shape(user)) == 4
        new = emit(graph, target, (flat, [order.first], keeps), user)
        return emit(graph, aten.unsqueeze.default, (new, order.first), user) if keeps else new
    return None


def _size(graph: fx.Graph, grid: _Grid, dim: Any, order: Order, flat: fx.Node) -> fx.Node:
    dim = normal_dim(dim, 4)
    if order.first <= dim < order.first + 2:
        source, dim = grid.entry, grid.entry_order.first + dim - order.first
    else:
        source, dim = flat, dim - (dim > order.first)
    new = graph.call_function(aten.sym_size.int, (source, dim))
    new.meta["val"] = source.meta["val"].shape[dim]
    return new


def _over_grid(user: fx.Node, order: Order) -> bool:
    dims = call_argument(user, 1, "dim", None)
    if not isinstance(dims, (list, tuple)) or set(user.kwargs) - {"dim", "keepdim"}:
        return False
    return sorted(d % 4 for d in dims) == [order.first, order.first + 1]


def _pools_all(user: fx.Node, order: Order) -> bool:
    """Whether ``user`` is the mean over all positions."""
    return op_name(user) == "adaptive_avg_pool2d" and order is not LAST and example_shape(user)[2:] == (1, 1)


def _on_grid(graph: fx.Graph, grid: _Grid, node: fx.Node) -> fx.Node:
    sizes = []
    for dim in (grid.entry_order.first, grid.entry_order.first + 1):
        size = grid.entry.meta["val"].shape[dim]
        if not isinstance(size, int):
            size = graph.call_function(aten.sym_size.int, (grid.entry, dim))
            size.meta["val"] = grid.entry.meta["val"].shape[dim]
        sizes.append(size)
    return emit(graph, aten.unflatten.int, (grid.of(node), grid.nodes[node].first, sizes), node)
