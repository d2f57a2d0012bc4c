"""Rows that a mask selects, added to and put back: the same as an addition at every position.

Start at :func:`whole_additions`. ``x[mask] = x[mask] + y`` reads and writes as many rows of ``x [B, N, C]`` as the mask has
true entries, so its tokens cannot be followed through. It becomes ``x + z``, where ``z`` holds the rows of ``y`` at these
positions and zeros elsewhere: ``z`` is a side input along the tokens like any other. So does
``x.masked_scatter(mask, x[mask] + y)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.node import Argument, Target

from rewriters.graph.emit import emit
from rewriters.graph.match import NoMatch, attempt
from rewriters.graph.nodes import example_shape, is_tensor, op_name
from rewriters.graph.op_sets import CASTS, COPIES, RESHAPES
from rewriters.graph.walk import behind

aten = torch.ops.aten

ONE_ROW_EACH = "x[mask] = x[mask] + rows, by a mask [B, N] of tokens [B, N, C], with a row for each of its true entries"


@dataclass(frozen=True)
class _Addition:
    """Rows ``[n, C]`` that are added at the true entries of a mask ``[B, N]`` or ``[B, N, 1]``."""

    mask: fx.Node
    rows: fx.Node


def whole_additions(graph: fx.Graph) -> None:
    """Replace every such addition to selected rows, in place."""
    readers = {"index_put": _put, "masked_scatter": _scattered}
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in readers:
            continue
        with attempt(node, ONE_ROW_EACH):  # sizes that depend on data: nothing is known of these rows
            _replace(graph, node, readers[op_name(node)](node))


def _put(node: fx.Node) -> _Addition:
    """What a write to selected rows adds to them; raises :class:`NoMatch` if it does anything else."""
    mask = _mask(node)
    if mask is None:
        raise NoMatch(node, "its places are not a mask [B, N] of tokens [B, N, C]", ONE_ROW_EACH)
    if len(node.args) > 3 and node.args[3]:
        return _Addition(mask, _fitting(node.args[2], node.args[0], node))
    return _added(node.args[2], node.args[0], mask, node)


def _scattered(node: fx.Node) -> _Addition:
    """The same for rows that are written one element after the other, by the mask along the channels."""
    base, channel_mask, value = node.args
    mask = _per_token(channel_mask)
    if mask is None:
        raise NoMatch(node, "its mask differs from channel to channel", ONE_ROW_EACH)
    return _added(behind(value, COPIES | RESHAPES), base, mask, node)


def _added(value: Argument, base: Argument, mask: fx.Node, write: fx.Node) -> _Addition:
    """What ``write`` adds where ``value`` is ``base[mask] + rows``; raises :class:`NoMatch` if it is anything else."""
    steps = ("a write by a mask",)
    if not isinstance(value, fx.Node) or op_name(value) != "add" or value.kwargs or len(value.args) != 2:
        raise NoMatch(
            write, "it replaces rows that a mask selects, or scales what it adds to them", ONE_ROW_EACH, steps
        )
    for read, rows in (value.args, value.args[::-1]):
        if not isinstance(read, fx.Node) or op_name(read) != "index":
            continue
        if behind(read.args[0], COPIES) is not behind(base, COPIES):
            continue
        chosen = _mask(read)
        if chosen is not None and _per_token(chosen) is _per_token(mask):
            return _Addition(chosen, _fitting(rows, base, write))
    raise NoMatch(write, "what it adds to are not the rows that it replaces", ONE_ROW_EACH, (*steps, "an addition"))


def _per_token(mask: Argument) -> fx.Node | None:
    """The mask ``[B, N]`` or ``[B, N, 1]`` that ``mask`` repeats; None if that differs from channel to channel."""
    while is_tensor(mask):
        source = mask.args[0] if mask.args else None
        if not is_tensor(source) or not _repeats(mask, source):
            value = mask.meta["val"]
            return mask if value.dim() == 2 or (value.dim() == 3 and _is_one(value.shape[2])) else None
        mask = source
    return None


def _repeats(mask: fx.Node, source: fx.Node) -> bool:
    """Whether ``mask`` says of each token what ``source`` does: the same, or along more or fewer channels."""
    name, old, new = op_name(mask), source.meta["val"], mask.meta["val"]
    if old.dtype != new.dtype:
        return False
    # A mask is boolean and has no gradient that a detach could stop.
    if name in CASTS | COPIES or name == "detach":
        return True
    if name == "unsqueeze":
        return old.dim() == 2 and mask.args[1] in (-1, 2)
    if name in ("squeeze", "select"):
        # Of a mask that differs from channel to channel this is another one: the walk ends there with None.
        return old.dim() == 3 and mask.args[1] in (-1, 2) and new.dim() == 2
    widened = name in ("expand", "expand_as") and old.dim() == new.dim() == 3 and _is_one(old.shape[2])
    return widened and example_shape(mask)[:2] == example_shape(source)[:2]


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _mask(node: fx.Node) -> fx.Node | None:
    """The mask ``[B, N]`` by which a node reads or writes rows of ``[B, N, C]``; None if it goes by something else."""
    base, indices = node.args[:2]
    if not is_tensor(base) or not isinstance(indices, (list, tuple)) or not indices:
        return None
    first, *others = indices
    if not is_tensor(first) or first.meta["val"].dtype != torch.bool or first.meta["val"].dim() != 2:
        return None
    return first if base.meta["val"].dim() == 3 and all(i is None for i in others) else None


def _fitting(rows: Argument, base: Argument, write: fx.Node) -> fx.Node:
    """``rows`` if there is one for each selected position, of the type of ``base``; :class:`NoMatch` if they are spread."""
    if is_tensor(rows) and is_tensor(base):
        have, want = example_shape(rows), example_shape(base)
        same_type = rows.meta["val"].dtype == base.meta["val"].dtype
        if len(have) == 2 and have[0] != 1 and have[1] == want[2] and same_type:
            return rows
    steps = ("a write by a mask", "an addition")
    raise NoMatch(write, "it does not add one row of the tokens' type to each of them", ONE_ROW_EACH, steps)


def _replace(graph: fx.Graph, node: fx.Node, found: _Addition) -> None:
    mask, rows = found.mask, found.rows
    whole = node.meta["val"]

    def new(target: Target, arguments: tuple[Argument, ...], value: object) -> fx.Node:
        made = graph.create_node("call_function", target, arguments)
        made.meta = {**node.meta, "val": value}
        return made

    with graph.inserting_before(node):
        # Of the mask, not of the base: that has fewer tokens when some are pruned.
        sizes = [new(aten.sym_size.int, (mask, dim), mask.meta["val"].shape[dim]) for dim in (0, 1)]
        zeros = new(aten.new_zeros.default, (rows, [*sizes, int(whole.shape[2])]), whole)
        places = emit(graph, aten.unsqueeze.default, (mask, -1), node)
        spread = new(aten.masked_scatter.default, (zeros, places, rows), whole)
        added = new(aten.add.Tensor, (node.args[0], spread), whole)
    node.replace_all_uses_with(added)
    graph.erase_node(node)
