"""The graph of several images under construction: where the batch dimension goes, and new nodes with their shapes.

Start at :class:`Batching`. Every tensor that depends on the image gets the batch in front, ``[B, *shape]``. One that begins
with a dimension of size 1, as a batch of one image does, gets the batch in that place, ``[B, *shape[1:]]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rewriters.graph.nodes import AxisError, op_name

aten = torch.ops.aten
Rule = Callable[["Batching", fx.Node], fx.Node]


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor for one image, and where the batch goes.

    Attributes:
        sizes: The shape.
    """

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
    """The graph under construction.

    Attributes:
        graph: The new graph.
        mode: Computes the shapes of new nodes.
        env: New nodes, by nodes of the graph for one image.
        batched: Nodes of the old graph that depend on the image.
        tuples_in_front: Those of them that yield several tensors, each with the batch in front of all its dimensions.
        batch: The node that holds the number of images.
        like: The old node that is being written; new nodes get its module path.
    """

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self.graph, self.mode = graph, mode
        self.env: dict[fx.Node, fx.Node] = {}
        self.batched: set[fx.Node] = set()
        self.tuples_in_front: set[fx.Node] = set()
        self.batch: fx.Node | None = None
        self.like: fx.Node | None = None

    def shape(self, node: fx.Node) -> Shape:
        """The shape of a tensor of one image.

        Raises:
            AxisError: It is not a tensor, or its sizes are not known.
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

    def in_front(self, node: fx.Node) -> fx.Node:
        """A tensor of several images with the batch in front of all its dimensions."""
        new = self.env[node]
        return self.emit(aten.unsqueeze.default, new, 1) if self.shape(node).lead else new

    def compact(self, new: fx.Node, node: fx.Node) -> fx.Node:
        """The inverse of :meth:`in_front`: the batch takes the place of a first dimension of size 1."""
        return self.emit(aten.squeeze.dim, new, 1) if self.shape(node).lead else new

    def trailing(self, node: Any, count: int) -> Any:
        """An operand with ``count`` dimensions behind the batch, for broadcasting; unchanged if it depends on no image."""
        if not isinstance(node, fx.Node):
            return node
        new = self.env[node]
        if node in self.batched:
            for _ in range(count - len(self.shape(node).rest)):
                new = self.emit(aten.unsqueeze.default, new, 1)
        return new

    def reshaped(self, new: fx.Node, shape: Sequence[int]) -> fx.Node:
        """``[B, *shape]``."""
        return self.emit(aten.reshape.default, new, [self.batch, *shape])

    def mapped(self, value: Any) -> Any:
        """Arguments of an old node, with new nodes in place of old ones."""
        return fx.map_arg(value, lambda n: self.env[n])


def operand_list(node: fx.Node, position: int = 0) -> list[fx.Node]:
    """The argument of ``node`` at ``position``, which is a list of nodes."""
    values = node.args[position]
    assert isinstance(values, (list, tuple)), f"argument {position} of {node.name} is not a list"
    return [value for value in values if isinstance(value, fx.Node)]
