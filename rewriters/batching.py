"""Batching: from the graph of one image to the graph of several, one image after the other along a new first dimension.

Start at :func:`batched`. Every tensor that depends on the image gets the batch in front, ``[B, *shape]``; one that begins
with a dimension of size 1, as a batch of one image does, gets it in that place, ``[B, *shape[1:]]``. How an operation has
to be written for that says the table in ``batching_rules.py``; an operation without a rule is a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from rewriters.axes import AxisError
from rewriters.functional import functional, has_effect
from rewriters.outcomes import op_name

aten = torch.ops.aten
Rule = Callable[["Batching", fx.Node], fx.Node]


@dataclass(frozen=True)
class Shape:
    """The shape ``sizes`` that a tensor has for one image, and where the batch goes."""

    sizes: tuple[int, ...]

    @property
    def lead(self) -> int:
        """1 if the batch takes the place of the first dimension, 0 if it goes in front."""
        return int(bool(self.sizes) and self.sizes[0] == 1)

    @property
    def rest(self) -> tuple[int, ...]:
        """Sizes behind the batch."""
        return self.sizes[self.lead :]


class Batching:
    """The graph under construction. env: new nodes by those of one image. many: old nodes that depend on the image."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self.graph, self.mode = graph, mode
        self.env: dict[fx.Node, fx.Node] = {}
        self.many: set[fx.Node] = set()
        self.full: set[fx.Node] = set()
        self.batch: fx.Node | None = None
        self.like: fx.Node | None = None

    def shape(self, node: fx.Node) -> Shape:
        """The shape of a tensor of one image.

        Raises:
            AxisError: it is no tensor, or its sizes are not known.
        """
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape):
            raise AxisError(f"the shape of {node.name} is not known")
        return Shape(tuple(value.shape))

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, with the value that ``target`` has for its arguments."""
        assert self.like is not None
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: value for key, value in self.like.meta.items() if key != "val"}
        values = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (args, kwargs))
        try:
            # The dispatcher's own code for composite operations does not know symbolic sizes in every release of torch.
            with self.mode, torch.no_grad(), enable_python_dispatcher():
                node.meta["val"] = target(*values[0], **values[1])
        except Exception as error:  # shapes that do not fit raise many kinds
            raise AxisError(f"{op_name(node)} does not work on several images: {error}") from error
        return node

    def whole(self, node: fx.Node) -> fx.Node:
        """A tensor of many images with the batch in front of all its dimensions."""
        new = self.env[node]
        return self.emit(aten.unsqueeze.default, new, 1) if self.shape(node).lead else new

    def settled(self, new: fx.Node, node: fx.Node) -> fx.Node:
        """What :meth:`whole` undoes: the batch in the place of a first dimension of size 1."""
        return self.emit(aten.squeeze.dim, new, 1) if self.shape(node).lead else new

    def trailing(self, node: Any, count: int) -> Any:
        """An operand with ``count`` dimensions behind the batch, for broadcasting; what depends on no image as it is."""
        if not isinstance(node, fx.Node):
            return node
        new = self.env[node]
        if node in self.many:
            for _ in range(count - len(self.shape(node).rest)):
                new = self.emit(aten.unsqueeze.default, new, 1)
        return new

    def reshaped(self, new: fx.Node, shape: Sequence[int]) -> fx.Node:
        """``[B, *shape]``."""
        return self.emit(aten.reshape.default, new, [self.batch, *shape])

    def old(self, value: Any) -> Any:
        """Arguments of an old node with the new nodes in their places."""
        return fx.map_arg(value, lambda n: self.env[n])


def batched(graph: fx.Graph, images: Collection[fx.Node], examples: Sequence[Tensor]) -> fx.Graph:
    """The graph that does for a batch of images what ``graph`` does for one. Outputs are stacked.

    Args:
        images: placeholders of ``graph`` that hold one image. examples: what they are for the example's batch, in their order.
    Raises:
        AxisError: an operation has no rule.
    """
    from rewriters.batching_rules import rule_of

    functional(graph)
    work = Batching(fx.Graph(), _mode(graph))
    for node in graph.nodes:
        work.like = node
        if node.op == "output":
            work.graph.output(tuple(_stacked(work, leaf) for leaf in node.args[0])).meta = dict(node.meta)
        elif node in images:
            _image(work, node, examples[list(images).index(node)])
        elif not any(n in work.many for n in node.all_input_nodes):
            work.env[node] = new = work.graph.node_copy(node, lambda n: work.env[n])
            new.meta = dict(node.meta)
        elif node.users or has_effect(node):
            work.env[node] = new = rule_of(work, node)(work, node)
            work.many.add(node)
            _check(work, node, new)
    return work.graph


def _check(work: Batching, node: fx.Node, new: fx.Node) -> None:
    value = new.meta["val"]
    if isinstance(value, Tensor) and tuple(value.shape[1:]) != work.shape(node).rest:
        raise AxisError(f"{op_name(node)} on several images at once gives {tuple(value.shape)}")


def _mode(graph: fx.Graph) -> FakeTensorMode:
    values = (n.meta.get("val") for n in graph.nodes)
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))


def _image(work: Batching, node: fx.Node, example: Tensor) -> None:
    new = work.graph.node_copy(node)
    new.meta = dict(node.meta)
    if work.batch is None:
        free: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        work.batch = work.graph.call_function(aten.sym_size.int, (new, 0))
        work.batch.meta["val"] = work.mode.from_tensor(torch.empty(len(example)), symbolic_context=free).shape[0]
    with work.mode:
        sizes = (work.batch.meta["val"], *example.shape[1:])
        new.meta["val"] = torch.empty(sizes, dtype=example.dtype, device=example.device)
    work.env[node] = new
    work.many.add(node)
    work.env[node] = work.settled(new, node)


def _stacked(work: Batching, leaf: Any) -> Any:
    """An output for all images, the batch in front of its dimensions."""
    if not isinstance(leaf, fx.Node):
        return leaf
    work.like = leaf
    if leaf in work.many:
        return work.whole(leaf)
    if not isinstance(leaf.meta.get("val"), Tensor):
        return work.env[leaf]
    alone = work.emit(aten.unsqueeze.default, work.env[leaf], 0)
    return work.emit(aten.expand.default, alone, [work.batch, *work.shape(leaf).sizes])
