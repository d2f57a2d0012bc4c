"""An operation for submodules that work row by row (``mixture_of_experts.py``), while a model is captured and rewritten.

Start at :func:`calling_rowwise_op`. The operation exists between capture and lifting only: :func:`call_rowwise_modules`
replaces it by calls of the submodules themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from rewriters.graph.node_record import RowwiseModule, record, rowwise_module, set_record

# The submodules that the operation represents while a model is traced, by path.
_traced: dict[str, RowwiseModule] = {}


@torch.library.custom_op("madtp::rowwise", mutates_args=())
def rowwise(operands: list[Tensor], path: str) -> list[Tensor]:
    """A call of the submodule at ``path``, which works row by row."""
    raise NotImplementedError("it appears in graphs that are being rewritten, and is never run")


@rowwise.register_fake
def _(operands: list[Tensor], path: str) -> list[Tensor]:
    form = _traced[path]
    like = next(one for one in operands if one.dim() >= form.rank)
    rows = like.shape[: form.rank]
    return [like.new_empty((*rows, *sizes), dtype=dtype) for dtype, sizes in form.results]


@contextmanager
def calling_rowwise_op(model: nn.Module, found: Sequence[RowwiseModule]) -> Iterator[None]:
    """Inside the block, tracing sees each of the submodules ``found`` as one operation."""
    patched: list[tuple[dict[str, Any], Any]] = []
    _traced.update({form.path: form for form in found})
    try:
        for form in found:
            attributes = model.get_submodule(form.path).__dict__
            patched.append((attributes, attributes.get("forward")))
            attributes["forward"] = _operation(form, model.get_submodule(form.path).forward)
        yield
    finally:
        for attributes, before in patched:
            del attributes["forward"]
            if before is not None:
                attributes["forward"] = before
        _traced.clear()


def _operation(form: RowwiseModule, forward: Callable[..., Any]) -> Callable[..., Any]:
    def operation(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(isinstance(one, FakeTensor) for one in operands):
            with torch._C.DisableTorchFunction():
                return forward(*args, **kwargs)
        others = tuple((at, leaf) for at, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        if spec != form.spec or others != form.constants:
            raise ValueError(f"{form.path} is called in different ways")
        results = torch.ops.madtp.rowwise(operands, form.path)
        if form.result_numbers is None:
            return results[0]
        return tuple(None if number is None else results[number] for number in form.result_numbers)

    return operation


def record_rowwise(graph: fx.Graph, found: Sequence[RowwiseModule]) -> None:
    """Record at each operation which submodule it represents."""
    forms = {form.path: form for form in found}
    for node in graph.nodes:
        if node.target is torch.ops.madtp.rowwise.default:
            set_record(node, replace(record(node), rowwise=forms[str(node.args[1])]))


def call_rowwise_modules(graph: fx.Graph) -> None:
    """Replace each operation, in place, by a call of the submodule that it represents."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.madtp.rowwise.default:
            continue
        form = rowwise_module(node)
        operands, others = iter(node.args[0]), dict(form.constants)
        count = form.spec.num_leaves
        args, kwargs = pytree.tree_unflatten(
            [others[n] if n in others else next(operands) for n in range(count)], form.spec
        )
        with graph.inserting_before(node):
            call = graph.call_module(form.path, args, kwargs)
        values = node.meta["val"]
        returned = (
            values[0]
            if form.result_numbers is None
            else [None if n is None else values[n] for n in form.result_numbers]
        )
        call.meta = {**node.meta, "val": returned}
        for user in list(node.users):
            assert user.target is operator.getitem
            if form.result_numbers is None:
                user.replace_all_uses_with(call)
                graph.erase_node(user)
            else:
                number = user.args[1]
                assert isinstance(number, int)
                user.args = (call, form.result_numbers.index(number))
        graph.erase_node(node)
