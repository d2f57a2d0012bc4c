"""Cuts after the special tokens of a stream: the class token and registers, which come before the others.

Start at :func:`plain_slices`. A cut after at most :data:`~rewriters.axes.slice_rules.PREFIX` tokens separates special
tokens. A cut after more does so if as many learned tokens are concatenated in front of others somewhere, and are few
compared with them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rewriters.axes.slice_rules import PREFIX, is_whole_end
from rewriters.graph.dependencies import given_nodes
from rewriters.graph.node_record import record, set_record
from rewriters.graph.nodes import call_argument, example_shape, is_tensor, normal_dim, op_name, operand
from rewriters.graph.op_sets import CONCATENATIONS, SPLITS

END = 9223372036854775807
# Learned tokens are special while they are at most this part of all; more of them (queries in front of a text) are a segment.
FEW = 4


def plain_slices(graph: fx.Graph) -> None:
    """Turn a split into the first few entries and the others into two slices, by which later stages know special tokens."""
    learned = set(_learned_prefixes(graph))
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in SPLITS - {"chunk"}:
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
    """Mark slices that begin or end after learned tokens of which there are more than ``PREFIX``."""
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
    """Yields, for concatenations that begin with more learned tokens than ``PREFIX`` but few compared with the others, how many
    these are, and how many tokens there are in all."""
    given = given_nodes(graph)
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) not in CONCATENATIONS or not is_tensor(node):
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
