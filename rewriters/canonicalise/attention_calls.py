"""One attention in place of a call for each window of tokens, of which the outputs are put together again.

Start at :func:`join_attention_calls`. A concatenation of the outputs is read backwards, all of its operands at once: past steps
that are the same for all to the attention of each window, and from its queries, keys and values on to the tensor that they are
consecutive parts of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from madtp.tokens.attention import attention
from rewriters.graph.emit import emit
from rewriters.graph.match import Miss, remember
from rewriters.graph.nodes import (
    AxisError,
    call_argument,
    example_shape,
    normal_dim,
    op_name,
    operand,
    permutation,
)
from rewriters.graph.op_sets import CONCATENATIONS, COPIES, PERMUTATIONS, SIZED_VIEWS, SPLITS
from rewriters.graph.walk import operand_chain

aten = torch.ops.aten
TOKENS = 2
HELP = "queries, keys and values that are cut into the same consecutive windows, without masks, put together in their order"


def join_attention_calls(graph: fx.Graph) -> None:
    """Join the calls in front of every concatenation, in place."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in CONCATENATIONS:
            continue
        given = node.args[0]
        if not isinstance(given, (list, tuple)) or len(given) < 2 or not all(isinstance(n, fx.Node) for n in given):
            continue
        parts = cast(list[fx.Node], list(given))
        calls = [list(operand_chain(part, _is_step))[-1] for part in parts]
        if any(call.target is not attention for call in calls):
            continue
        try:
            with graph.inserting_before(node):
                dim = normal_dim(call_argument(node, 1, "dim", 0), len(example_shape(node)))
                node.replace_all_uses_with(_Joining(graph).outputs(parts, dim))
        except AxisError as error:
            for call in calls:
                remember(call, Miss(call, str(error), HELP, ("attention",)))


@dataclass(frozen=True)
class _Joining:
    """Joins parts of tensors at the insertion point of ``graph``."""

    graph: fx.Graph

    def outputs(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        """The outputs of all windows; raises :class:`AxisError` if they are not those of one attention."""
        if parts[0].target is not attention:
            return self._step(parts, dim, self.outputs)
        calls = [(n.target, n.args[3:], n.kwargs) for n in parts]
        _, options, named = calls[0]
        if dim != TOKENS or any(call != calls[0] for call in calls) or options[0] is not None or options[2]:
            raise AxisError("the calls differ, have masks, or are put together along another dimension than the tokens")
        windows = tuple(_size(n, TOKENS) for n in parts)
        tensors = [[operand(n, position) for n in parts] for position in range(3)]
        if any(tuple(_size(n, TOKENS) for n in own) != windows for own in tensors):
            raise AxisError("queries and keys are not cut into the same windows")
        whole = [self.tensor(own, TOKENS) for own in tensors]
        return emit(self.graph, attention, (*whole, *options), parts[0], **{**named, "windows": windows})

    def tensor(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        """The tensor that consists of ``parts`` along ``dim``; raises :class:`AxisError` if there is none."""
        sources = {operand(n) for n in parts}
        if len(sources) > 1:
            return self._step(parts, dim, self.tensor)
        source = sources.pop()
        if op_name(source) in SPLITS:
            number = call_argument(source, 2, "dim", 0)
            wanted, whole = [(source, n) for n in range(len(source.meta["val"]))], operand(source)
            ordered = [n.args for n in parts] == wanted
        else:
            number, whole = call_argument(parts[0], 1, "dim", 0), source
            ordered = _are_slices(parts, number, _size(source, dim))
        if not ordered or normal_dim(number, len(example_shape(whole))) != dim:
            raise AxisError("what is joined are not all parts of one tensor in their order")
        return whole

    def _step(self, parts: Sequence[fx.Node], dim: int, join: Callable[[Sequence[fx.Node], int], fx.Node]) -> fx.Node:
        """A step that is the same for all parts, done once; ``join`` joins its operands."""
        first = parts[0]
        if not all(_is_step(n) and n.target is first.target for n in parts):
            raise AxisError("the windows do not all take the same steps")
        moved = _dim_before(first, dim)
        if any(_step_of(n, dim) != _step_of(first, dim) for n in parts):
            raise AxisError("the windows do not all take the same steps")
        joined = join([operand(n) for n in parts], moved)
        arguments = list(first.args[1:])
        if op_name(first) in SIZED_VIEWS:
            sizes: Any = list(cast(Any, arguments[0]))
            sizes[dim] = _size(joined, moved)
            arguments[0] = sizes
        return emit(self.graph, first.target, (joined, *arguments), first, **first.kwargs)


def _is_step(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in PERMUTATIONS | COPIES | SIZED_VIEWS


def _step_of(node: fx.Node, dim: int) -> object:
    """The arguments of a step, all but the size of the dimension of tokens."""
    arguments: Any = node.args[1:]
    if op_name(node) in SIZED_VIEWS:
        arguments = [[size for position, size in enumerate(arguments[0]) if position != dim]]
    return list(arguments), node.kwargs


def _dim_before(node: fx.Node, dim: int) -> int:
    """The dimension of the operand that a step makes dimension ``dim``."""
    before, after = example_shape(operand(node)), example_shape(node)
    if op_name(node) in PERMUTATIONS:
        return permutation(node, len(before))[dim]
    if op_name(node) in COPIES:
        return dim
    for position, size in enumerate(before):
        if size == after[dim] and math.prod(before[:position]) == math.prod(after[:dim]):
            return position
    raise AxisError(f"{op_name(node)} joins or cuts the dimension of tokens")


def _size(node: fx.Node, dim: int) -> int:
    """The size of a dimension; raises :class:`AxisError` if it is not the same in all calls."""
    size = node.meta["val"].shape[dim]
    if not isinstance(size, int):
        raise AxisError("the number of tokens is not known")
    return size


def _are_slices(parts: Sequence[fx.Node], dim: int, whole: int) -> bool:
    """Whether parts are slices along ``dim``, one behind the other, of a dimension of ``whole`` entries."""
    start = 0
    for node in parts:
        begin, end, step = (
            call_argument(node, n, name, d) for n, name, d in ((2, "start", 0), (3, "end", None), (4, "step", 1))
        )
        if op_name(node) != "slice" or call_argument(node, 1, "dim", 0) != dim or (begin or 0) != start or step != 1:
            return False
        start += _size(node, normal_dim(dim, len(example_shape(node))))
        if end is not None and min(end, whole) != start:
            return False
    return start == whole
