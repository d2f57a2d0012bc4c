"""Rows that a mask selects, added to and put back: the same as an addition at every position.

Start at :func:`whole_additions`. ``x[mask] = x[mask] + y`` reads and writes as many rows of ``x [B, N, C]`` as the mask has
true entries, so its tokens cannot be followed through. It becomes ``x + z``, where ``z`` holds the rows of ``y`` at these
positions and zeros elsewhere: ``z`` is a side input along the tokens like any other.
So does ``x.masked_scatter(mask, x[mask] + y)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, example_shape, is_tensor, op_name

aten = torch.ops.aten
SAME = frozenset("clone alias detach contiguous".split())
FLAT = SAME | frozenset("view reshape flatten _unsafe_view".split())


def whole_additions(graph: fx.Graph) -> None:
    """Replace every such addition to selected rows, in place."""
    for node in list(graph.nodes):
        name = op_name(node) if node.op == "call_function" else ""
        try:
            found = _put(node) if name == "index_put" else _scattered(node) if name == "masked_scatter" else None
        except AxisError:  # sizes that depend on data: nothing is known of these rows
            continue
        if found is not None:
            _replace(graph, node, *found)


def _put(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The mask ``[B, N]`` and the rows ``[n, C]`` that a write to selected rows adds to them; None if it does anything else."""
    mask = _mask(node)
    if mask is None:
        return None
    if len(node.args) > 3 and node.args[3]:
        rows = _fitting(node.args[2], node.args[0])
        return None if rows is None else (mask, rows)
    return _added(node.args[2], node.args[0], mask)


def _scattered(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The same for rows that are written one element after the other, by the mask along the channels."""
    base, mask, value = node.args
    mask = _per_token(mask)
    while isinstance(value, fx.Node) and op_name(value) in FLAT:
        value = value.args[0]
    return None if mask is None else _added(value, base, mask)


def _added(value: Any, base: Any, mask: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The mask and the rows, where ``value`` is ``base[mask] + rows``."""
    if not isinstance(value, fx.Node) or op_name(value) != "add" or value.kwargs or len(value.args) != 2:
        return None
    operands: tuple[Any, ...] = value.args
    for read, rows in (operands, operands[::-1]):
        if not isinstance(read, fx.Node) or op_name(read) != "index" or _origin(read.args[0]) is not _origin(base):
            continue
        chosen = _mask(read)
        if chosen is not None and _per_token(chosen) is _per_token(mask):
            fitting = _fitting(rows, base)
            return None if fitting is None else (chosen, fitting)
    return None


def _per_token(mask: Any) -> fx.Node | None:
    """The mask ``[B, N]`` or ``[B, N, 1]`` that ``mask`` repeats; None if that differs from channel to channel."""
    while is_tensor(mask):
        source: Any = mask.args[0] if mask.args else None
        if not is_tensor(source) or not _repeats(mask, source):
            break
        mask = source
    if not is_tensor(mask):
        return None
    value = mask.meta["val"]
    return mask if value.dim() == 2 or (value.dim() == 3 and _is_one(value.shape[2])) else None


def _repeats(mask: fx.Node, source: fx.Node) -> bool:
    """Whether ``mask`` says of each token what ``source`` does: the same, or along more or fewer channels."""
    name, old, new = op_name(mask), source.meta["val"], mask.meta["val"]
    if old.dtype != new.dtype:
        return False
    if name in SAME or name in ("to", "_to_copy"):
        return True
    if name == "unsqueeze":
        return old.dim() == 2 and mask.args[1] in (-1, 2)
    if name in ("squeeze", "select"):
        # Of a mask that differs from channel to channel this is another one: the walk ends there with None.
        return old.dim() == 3 and mask.args[1] in (-1, 2) and new.dim() == 2
    widened = name in ("expand", "expand_as") and old.dim() == new.dim() == 3 and _is_one(old.shape[2])
    return widened and example_shape(mask)[:2] == example_shape(source)[:2]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


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


def _replace(graph: fx.Graph, node: fx.Node, mask: fx.Node, rows: fx.Node) -> None:
    base: Any = node.args[0]
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
