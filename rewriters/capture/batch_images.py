"""From the graph of one image to the graph of a batch of images; start at :func:`batched`.

``batch_rules.py`` says how each operation is written for several images; an operation without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from rewriters.capture.batch_rules import rule_of
from rewriters.capture.batching import Batching, aten
from rewriters.graph.functional import functional, has_effect
from rewriters.graph.nodes import AxisError, op_name


def batched(graph: fx.Graph, images: Collection[fx.Node], examples: Sequence[Tensor]) -> fx.Graph:
    """Return a graph that computes for a batch of images what ``graph`` computes for one, with stacked outputs.

    Args:
        graph: The graph for one image.
        images: Placeholders of ``graph`` that hold the image.
        examples: Their values for the example's batch, in the order of ``images``.

    Raises:
        AxisError: An operation has no rule.
    """
    functional(graph)
    work = Batching(fx.Graph(), _mode(graph))
    for node in graph.nodes:
        work.like = node
        if node.op == "output":
            work.graph.output(tuple(_stacked(work, leaf) for leaf in node.args[0])).meta = dict(node.meta)
        elif node in images:
            _image(work, node, examples[list(images).index(node)])
        elif not any(n in work.batched for n in node.all_input_nodes):
            work.env[node] = new = work.graph.node_copy(node, lambda n: work.env[n])
            new.meta = dict(node.meta)
        elif node.users or has_effect(node):
            work.env[node] = new = rule_of(node)(work, node)
            work.batched.add(node)
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
    work.batched.add(node)
    work.env[node] = work.compact(new, node)


def _stacked(work: Batching, leaf: Any) -> Any:
    """An output for all images, the batch in front of its dimensions."""
    if not isinstance(leaf, fx.Node):
        return leaf
    work.like = leaf
    if leaf in work.batched:
        return work.in_front(leaf)
    if not isinstance(leaf.meta.get("val"), Tensor):
        return work.env[leaf]
    alone = work.emit(aten.unsqueeze.default, work.env[leaf], 0)
    return work.emit(aten.expand.default, alone, [work.batch, *work.shape(leaf).sizes])
