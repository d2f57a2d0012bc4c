"""Batching: from the graph of one image to the graph of several, one image after the other along a new first dimension.

Start at :func:`batched`. Every tensor that depends on the image gets the batch in front, ``[B, *shape]``; one that begins
with a dimension of size 1, as a batch of one image does, gets it in that place, ``[B, *shape[1:]]``. How an operation has
to be written for that says the table in ``batch_rules.py``; an operation without a rule is a refusal.
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
