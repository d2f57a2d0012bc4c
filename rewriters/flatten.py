"""Flatten: residual streams ``[B, H, W, C]`` become streams ``[B, H * W, C]``.

Start at :func:`flatten_grids`. What works on each place by itself is moved from the grid to flat tokens; only what needs the
grid (windows, a convolution, a pad) gets a view of it, so that the stream is one like any other and can be pruned.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rewriters.axes import AxisError, example_shape, is_tensor, normal_dim
from rewriters.detect import residual_of
from rewriters.emission import emit
from rewriters.outcomes import call_argument, is_attention, op_name
from rewriters.part_rules import reduce
from rewriters.rules import RULES, elementwise, like_first

aten = torch.ops.aten
LAST_DIMENSION = frozenset(("linear", "layer_norm", "rms_norm"))
REGROUPED = frozenset(("view", "reshape", "_unsafe_view"))
UNGROUPED = REGROUPED | {"unflatten"}


def cancel_permutes(graph: fx.Graph) -> None:
    """A permutation and the one that undoes it go."""
    for node in list(graph.nodes):
        if op_name(node) != "permute" or op_name(node.args[0]) != "permute":
            continue
        first: Any = node.args[0]
        rank = len(example_shape(node))
        inner, outer = ([normal_dim(d, rank) for d in n.args[1]] for n in (first, node))
        if [inner[d] for d in outer] == list(range(rank)):
            node.replace_all_uses_with(first.args[0])
            graph.erase_node(node)


def flatten_grids(graph: fx.Graph) -> None:
    """Flatten every residual stream of attention blocks that stands on a grid, in place."""
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        if not is_attention(node):
            continue
        with suppress(AxisError):
            order = {n: position for position, n in enumerate(graph.nodes)}
            block_input, added = residual_of(node, order)
            if len(example_shape(block_input)) != 4 or block_input in done or added in done:
                continue
            grid = _grid_around((block_input, added, *block_input.users))
            if grid is not None:
                done |= grid.nodes
                _flatten(graph, grid)


@dataclass
class _Grid:
    """Values on one grid that work on each place by itself. entry: a value of the grid that they are computed from.
    flat: what stands for a value now, ``[B, H * W, C]``."""

    nodes: set[fx.Node]
    entry: fx.Node
    flat: dict[fx.Node, fx.Node] = field(default_factory=dict)


def _grid_around(seeds: tuple[fx.Node, ...]) -> _Grid | None:
    """All values that hang together with ``seeds`` by operations on each place; None without one over the last dimension, which
    tells that channels stand last."""
    places = example_shape(seeds[0])[:3]
    found = {n for n in seeds if _is_pointwise(n, places)}
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        for other in (*node.all_input_nodes, *node.users):
            if other not in found and _is_pointwise(other, places):
                found.add(other)
                waiting.append(other)
    entries = [
        operand
        for node in sorted(found)
        for operand in node.all_input_nodes
        if operand not in found and is_tensor(operand) and _stands_on(operand, places)
    ]
    if not entries or not any(op_name(n) in LAST_DIMENSION for n in found):
        return None
    return _Grid(found, entries[0])


def _stands_on(node: fx.Node, places: tuple[int, ...]) -> bool:
    shape = example_shape(node)
    return len(shape) == 4 and shape[:3] == places


def _is_pointwise(node: fx.Node, places: tuple[int, ...]) -> bool:
    """Whether a value stands on the grid and depends, at each place, on what its operands hold there."""
    if node.op != "call_function" or not is_tensor(node) or not _stands_on(node, places):
        return False
    name = op_name(node)
    if name in LAST_DIMENSION:
        return (name == "linear" or len(node.args[1]) == 1) and _stands_on(node.args[0], places)  # type: ignore[arg-type]
    if RULES.get(name) not in (elementwise, like_first):
        return False
    return all(_fits(n, places) for n in node.all_input_nodes if is_tensor(n))


def _fits(operand: fx.Node, places: tuple[int, ...]) -> bool:
    """Whether an operand has an entry for each place of the grid, or one for all."""
    shape = example_shape(operand)
    return len(shape) < 2 or shape[-3:-1] in (places[1:], (1, 1))


def _flatten(graph: fx.Graph, grid: _Grid) -> None:
    for node in sorted(grid.nodes):
        with graph.inserting_before(node):
            arguments = fx.map_arg(node.args, lambda n: _operand(graph, grid, n))
            if op_name(node) in LAST_DIMENSION:
                arguments = (_operand(graph, grid, node.args[0]), *node.args[1:])
            grid.flat[node] = emit(graph, node.target, arguments, node, **node.kwargs)
    for node in sorted(grid.nodes, reverse=True):
        for user in list(node.users):
            if user not in grid.nodes:
                _show(graph, grid, node, user)
        if not node.users:
            graph.erase_node(node)


def _operand(graph: fx.Graph, grid: _Grid, operand: Any) -> Any:
    """What takes an operand's place beside flat tokens."""
    if not is_tensor(operand) or (operand not in grid.flat and len(example_shape(operand)) < 3):
        return operand
    if operand not in grid.flat:
        grid.flat[operand] = _flat_form(graph, operand)
    return grid.flat[operand]


def _flat_form(graph: fx.Graph, operand: fx.Node) -> fx.Node:
    """A value on the grid, or one for all its places, with both dimensions of the grid as one."""
    rank = len(example_shape(operand))
    source: Any = operand.args[0] if operand.op == "call_function" and op_name(operand) in UNGROUPED else None
    if rank == 4 and is_tensor(source):
        if len(example_shape(source)) == 3 and example_shape(source)[2] == example_shape(operand)[3]:
            return source
        heads = _heads_together(graph, operand, source)
        if heads is not None:
            return heads
    return emit(graph, aten.flatten.using_ints, (operand, rank - 3, rank - 2), operand)


def _heads_together(graph: fx.Graph, operand: fx.Node, permuted: fx.Node) -> fx.Node | None:
    """The flat form of heads ``[B, heads, H, W, D]`` that are put together to ``[B, H, W, heads * D]``; None if it is none."""
    split: Any = permuted.args[0] if op_name(permuted) == "permute" else None
    if not is_tensor(split) or op_name(split) not in REGROUPED or op_name(operand) not in REGROUPED:
        return None
    first: Any = split.args[1]
    last: Any = operand.args[1]
    rank = len(example_shape(split))
    order = [normal_dim(d, rank) for d in permuted.args[1]]  # type: ignore[union-attr, arg-type]
    at = order[1] if len(order) > 3 else 0
    grid = example_shape(operand)[1:3]
    if order[:1] != [0] or order[2:3] != [at + 1] or tuple(first[at : at + 2]) != grid or tuple(last[1:3]) != grid:
        return None
    count = grid[0] * grid[1]
    flat = emit(graph, aten.reshape.default, (split.args[0], [*first[:at], count, *first[at + 2 :]]), split)
    merged = [d - (d > at) for d in order if d != at + 1]
    flat = emit(graph, aten.permute.default, (flat, merged), permuted)
    return emit(graph, aten.reshape.default, (flat, [last[0], count, *last[3:]]), operand)


def _show(graph: fx.Graph, grid: _Grid, node: fx.Node, user: fx.Node) -> None:
    """Give a user that needs the grid a view of it; one that only regroups, counts or reduces it reads the flat tokens."""
    flat, name = grid.flat[node], op_name(user)
    with graph.inserting_before(user):
        if name in UNGROUPED and example_shape(user) == example_shape(flat):
            new = flat
        elif name in REGROUPED and isinstance(user.args[1], (list, tuple)):
            new = emit(graph, aten.reshape.default, (flat, user.args[1]), user)
        elif name == "flatten" and tuple(user.args[1:]) == (1, 2):
            new = flat
        elif name == "sym_size":
            dim: Any = user.args[1]
            new = graph.call_function(aten.sym_size.int, (grid.entry, dim) if dim < 3 else (flat, 2))
            new.meta = dict(user.meta)
        elif RULES.get(name) is reduce and _over_places(user):
            new = emit(graph, user.target, (flat, [1]), user)
        else:
            user.replace_input_with(node, _on_grid(graph, grid, node))
            return
    user.replace_all_uses_with(new)
    graph.erase_node(user)


def _over_places(user: fx.Node) -> bool:
    dims = call_argument(user, 1, "dim", None)
    keeps = call_argument(user, 2, "keepdim", False)
    return isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [1, 2] and not keeps


def _on_grid(graph: fx.Graph, grid: _Grid, node: fx.Node) -> fx.Node:
    sizes = []
    for dim in (1, 2):
        size = grid.entry.meta["val"].shape[dim]
        if not isinstance(size, int):
            size = graph.call_function(aten.sym_size.int, (grid.entry, dim))
            size.meta["val"] = grid.entry.meta["val"].shape[dim]
        sizes.append(size)
    return emit(graph, aten.unflatten.int, (grid.flat[node], 1, sizes), node)
