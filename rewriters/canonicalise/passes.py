"""Canonicalise: one spelling for everything that later stages look for.

Start at :data:`PASSES`. Export's bookkeeping goes, in-place operations become functional ones
(``graph/functional.py``), and every spelling of attention becomes one node, a call of
:func:`madtp.tokens.attention.attention` with named operands (``attention.py``). A map that is not a softmax of one product
stays, except for what mixes values along its keys (``attention_maps.py``). Values stay equal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from rewriters.canonicalise.attention import canonical_attention
from rewriters.canonicalise.attention_calls import join_attention_calls
from rewriters.canonicalise.attention_maps import kept_maps
from rewriters.canonicalise.einsum import plain_products
from rewriters.canonicalise.flatten_grids import cancel_permutes, flatten_grids
from rewriters.canonicalise.masked_additions import whole_additions
from rewriters.canonicalise.norms import canonical_norms
from rewriters.canonicalise.pooling import canonical_pooling
from rewriters.canonicalise.slice_writes import slice_writes_to_cat
from rewriters.canonicalise.softmaxes import plain_softmaxes
from rewriters.canonicalise.special_slices import END, mark_special, plain_slices
from rewriters.canonicalise.stacked_sums import plain_sums
from rewriters.capture.python_branches import keep_checks
from rewriters.graph.functional import functional, has_effect, writes
from rewriters.graph.nodes import call_argument, is_tensor, known_size, op_name
from rewriters.graph.op_sets import CASTS

BOOKKEEPING = frozenset(
    "_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size _is_all_true "
    "lazy_load_decompositions _vmap_increment_nesting _vmap_decrement_nesting".split()
)


def drop_bookkeeping(graph: fx.Graph) -> None:
    """Remove assertions and guards: which calls a graph serves is decided before it runs."""
    for node in reversed(list(graph.nodes)):
        guard = node.op == "call_module" and str(node.target).startswith("_guards")
        bookkeeping = guard or (node.op == "call_function" and op_name(node) in BOOKKEEPING)
        if bookkeeping and not node.users:
            graph.erase_node(node)


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Remove computations whose results nobody reads."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or has_effect(node))


def plain_getitem(graph: fx.Graph) -> None:
    """Turn any spelling of ``split(...)[i]`` into ``operator.getitem``."""
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) == "getitem":
            node.target = operator.getitem


def drop_conversions(graph: fx.Graph) -> None:
    """Remove conversions to the type and device that a tensor already has: they hide a residual stream."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in CASTS:
            continue
        before, after = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (node.args[0], node))
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            continue
        if (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def plain_narrows(graph: fx.Graph) -> None:
    """Turn ``narrow`` into a slice where its end is known."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.narrow.default:
            continue
        given, dim, begin, length = node.args
        if not is_tensor(given) or not isinstance(begin, int):
            continue
        taken, all_there = (value.meta["val"].shape[dim] for value in (node, given))
        start = begin if begin >= 0 else _sum(all_there, begin)
        if start is None:
            continue
        end = length if start == 0 else _sum(length, start)
        if end is None and known_size(all_there - start) == known_size(taken):
            end = END
        if end is None:
            continue
        with graph.inserting_before(node):
            cut = graph.call_function(torch.ops.aten.slice.Tensor, (given, dim, start, end))
        cut.meta = dict(node.meta)
        node.replace_all_uses_with(cut)
        graph.erase_node(node)


def _sum(size: object, more: int) -> int | None:
    """The sum of a known size and a number; None if the size is free."""
    return size + more if isinstance(size, int) else None


def drop_whole_slices(graph: fx.Graph) -> None:
    """Remove slices that take every entry, such as the last tokens of a window that is not full yet."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) != "slice" or writes(node):
            continue
        before, after = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (node.args[0], node))
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            continue
        if call_argument(node, 4, "step", 1) == 1 and list(map(known_size, before.shape)) == list(
            map(known_size, after.shape)
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def drop_empty_operands(graph: fx.Graph) -> None:
    """Remove operands without entries from concatenations, such as the special tokens of a model that has none."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) != "cat" or not isinstance(node.args[0], list | tuple):
            continue
        operands = [n for n in node.args[0] if isinstance(n, fx.Node) and is_tensor(n)]
        if len(operands) < len(node.args[0]) or len({n.meta["val"].dtype for n in operands}) != 1:
            continue
        dim = call_argument(node, 1, "dim", 0)
        shapes = [n.meta["val"].shape for n in operands]
        left = [n for n, shape in zip(operands, shapes, strict=True) if not _is_empty(shape, dim)]
        if len(left) == 1:
            node.replace_all_uses_with(left[0])
            graph.erase_node(node)
        elif left and len(left) < len(operands):
            node.args = (left, *node.args[1:])


def _is_empty(shape: Sequence[int | torch.SymInt], dim: int) -> bool:
    """Whether an operand of a concatenation along ``dim`` has no entries: it may be ``[0]`` whatever the others are."""
    return _is_zero(shape[0 if len(shape) == 1 else dim])


def _is_zero(size: int | torch.SymInt) -> bool:
    """Whether a size is zero in all calls that the capture serves."""
    return isinstance(size, int) and size == 0


def reshape_views(graph: fx.Graph) -> None:
    """Turn views into reshapes: pruned tensors need not have the strides that the captured ones had."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default and not any(writes(user) for user in node.users):
            node.target = torch.ops.aten.reshape.default


PASSES: tuple[tuple[str, Callable[[fx.Graph], None]], ...] = (
    ("keep checks", keep_checks),
    ("drop bookkeeping", drop_bookkeeping),
    ("functional", functional),
    ("filled to cat", slice_writes_to_cat),
    ("drop conversions", drop_conversions),
    ("plain narrows", plain_narrows),
    ("drop whole slices", drop_whole_slices),
    ("drop empty operands", drop_empty_operands),
    ("plain getitem", plain_getitem),
    ("plain slices", plain_slices),
    ("special slices", mark_special),
    ("reshape views", reshape_views),
    ("whole additions", whole_additions),
    ("dead code before", eliminate_dead_code),
    ("plain sums", plain_sums),
    ("plain products", plain_products),
    ("plain softmaxes", plain_softmaxes),
    ("canonical norms", canonical_norms),
    ("canonical attention", canonical_attention),
    ("attention calls", join_attention_calls),
    ("kept maps", kept_maps),
    ("canonical pooling", canonical_pooling),
    ("cancel permutes", cancel_permutes),
    ("flatten grids", flatten_grids),
    ("dead code after", eliminate_dead_code),
)


def canonicalise(graph: fx.Graph) -> None:
    """Run all passes in place."""
    for _, step in PASSES:
        step(graph)
        graph.lint()
