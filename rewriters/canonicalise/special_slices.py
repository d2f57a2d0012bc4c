"""Cuts behind the special tokens of a stream: the class token and registers, which stand in front of the others.

Start at :func:`plain_slices`. A cut behind at most :data:`~rewriters.axes.parts.PREFIX` tokens separates special tokens; one
behind more does if as many learned tokens were put in front of others somewhere, and they are few beside these.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rewriters.axes.parts import PREFIX, is_whole_end
from rewriters.graph.node_record import record, set_record
from rewriters.graph.nodes import call_argument, example_shape, is_tensor, normal_dim, op_name, operand
from rewriters.graph.origins import given_nodes

END = 9223372036854775807
# Learned tokens are special while they are at most this part of all; more of them (queries beside a text) are a segment.
FEW = 4


def plain_slices(graph: fx.Graph) -> None:
    """A split into the first few entries and the others becomes two slices: special tokens are told by such slices."""
    learned = set(_learned_prefixes(graph))
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in ("split", "split_with_sizes"):
            continue
        sizes, dim = node.args[1], call_argument(node, 2, "dim", 0)
        two = isinstance(sizes, (list, tuple)) and len(sizes) == 2 and isinstance(sizes[0], int)
        if dim == 0 or not two or any(u.target is not operator.getitem for u in node.users):
            continue
        few = 0 < sizes[0] <= PREFIX or (sizes[0], _length(node.args[0], dim)) in learned
        if not few:
            continue
        for part in list(node.users):
            bounds = (0, sizes[0]) if part.args[1] in (0, -2) else (sizes[0], END)
            with graph.inserting_before(part):
                cut = graph.call_function(torch.ops.aten.slice.Tensor, (node.args[0], dim, *bounds))
            cut.meta = dict(part.meta)
            part.replace_all_uses_with(cut)
            graph.erase_node(part)
        graph.erase_node(node)


def mark_special(graph: fx.Graph) -> None:
    """Mark slices that begin or end behind learned tokens of which there are more than ``PREFIX``."""
    learned = set(_learned_prefixes(graph))
    for node in graph.nodes if learned else ():
        if node.op != "call_function" or op_name(node) != "slice" or not is_tensor(node.args[0]):
            continue
        length = _length(operand(node), call_argument(node, 1, "dim", 0))
        start, end = call_argument(node, 2, "start", 0) or 0, call_argument(node, 3, "end", None)
        border = start if is_whole_end(end, length) else end if start == 0 else None
        if isinstance(border, int) and (border, length) in learned:
            set_record(node, replace(record(node), special_cut=True))


def _learned_prefixes(graph: fx.Graph) -> Iterator[tuple[int, int]]:
    """How many learned tokens stand in front, of how many in all: more than ``PREFIX``, and few beside the others."""
    given = given_nodes(graph)
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) not in ("cat", "concat") or not is_tensor(node):
            continue
        dim = normal_dim(call_argument(node, 1, "dim", 0), len(example_shape(node)))
        length, count = example_shape(node)[dim], 0
        operands: Any = node.args[0]
        for part in operands:
            if part in given:
                break
            count += example_shape(part)[dim] if len(example_shape(part)) > dim else 0
        if count > PREFIX and FEW * count <= length:
            yield count, length


def _length(node: fx.Node, dim: int) -> int:
    shape = example_shape(node)
    return shape[normal_dim(dim, len(shape))]
