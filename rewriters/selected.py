"""Rows that a mask selects, added to and put back: the same as an addition at every position.

Start at :func:`whole_additions`. ``x[mask] = x[mask] + y`` reads and writes as many rows of ``x [B, N, C]`` as the mask has
true entries, so its tokens cannot be followed through. It becomes ``x + z``, where ``z`` holds the rows of ``y`` at these
positions and zeros elsewhere: ``z`` is a side input along the tokens like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriters.axes import example_shape, is_tensor
from rewriters.emission import emit
from rewriters.outcomes import op_name

aten = torch.ops.aten
SAME = frozenset("clone alias detach contiguous".split())


def whole_additions(graph: fx.Graph) -> None:
    """Replace every such addition to selected rows, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "index_put":
            rows = _added(node)
            if rows is not None:
                _replace(graph, node, rows)


def _added(node: fx.Node) -> fx.Node | None:
    """The rows ``[n, C]`` that a write to selected rows adds to them; None if it does anything else."""
    base: Any = node.args[0]
    value: Any = node.args[2]
    mask = _mask(node)
    if mask is None:
        return None
    if len(node.args) > 3 and node.args[3]:
        return _fitting(value, base)
    if not isinstance(value, fx.Node) or op_name(value) != "add" or value.kwargs or len(value.args) != 2:
        return None
    operands: tuple[Any, ...] = value.args
    for read, rows in (operands, operands[::-1]):
        selects = isinstance(read, fx.Node) and op_name(read) == "index" and _mask(read) is mask
        if selects and _origin(read.args[0]) is _origin(base):
            return _fitting(rows, base)
    return None


def _mask(node: fx.Node) -> fx.Node | None:
    """The mask ``[B, N]`` by which a node reads or writes rows of ``[B, N, C]``; None if it goes by something else."""
    base: Any = node.args[0]
    indices: Any = node.args[1]
    if not is_tensor(base) or not isinstance(indices, (list, tuple)) or not indices:
        return None
    first, *others = indices
    mask = is_tensor(first) and first.meta["val"].dtype == torch.bool and first.meta["val"].dim() == 2
    return first if mask and base.meta["val"].dim() == 3 and all(i is None for i in others) else None


def _fitting(rows: Any, base: Any) -> fx.Node | None:
    """``rows`` if there is one for each selected position, of the type of ``base``; None if they are spread over several."""
    if not is_tensor(rows):
        return None
    have, want = example_shape(rows), example_shape(base)
    fits = len(have) == 2 and have[0] != 1 and have[1] == want[2] and rows.meta["val"].dtype == base.meta["val"].dtype
    return rows if fits else None


def _origin(value: Any) -> Any:
    while isinstance(value, fx.Node) and op_name(value) in SAME:
        value = value.args[0]
    return value


def _replace(graph: fx.Graph, node: fx.Node, rows: fx.Node) -> None:
    base: Any = node.args[0]
    mask = _mask(node)
    assert mask is not None
    whole = node.meta["val"]

    def new(target: Any, arguments: tuple[Any, ...], value: Any) -> fx.Node:
        made = graph.call_function(target, arguments)
        made.meta = {**node.meta, "val": value}
        return made

    with graph.inserting_before(node):
        # Of the mask, not of the base: that has fewer tokens when some are pruned.
        sizes = [new(aten.sym_size.int, (mask, dim), mask.meta["val"].shape[dim]) for dim in (0, 1)]
        zeros = new(aten.new_zeros.default, (rows, [*sizes, int(whole.shape[2])]), whole)
        places = emit(graph, aten.unsqueeze.default, (mask, -1), node)
        spread = new(aten.masked_scatter.default, (zeros, places, rows), whole)
        added = new(aten.add.Tensor, (base, spread), whole)
    node.replace_all_uses_with(added)
    graph.erase_node(node)
