"""How each operation on one image is written for several images; start at :func:`rule_of`.

Sizes and dimensions in the arguments are those of one image. ``lead`` is 1 where the batch takes the place of the
first dimension, so dimension d of one image is dimension d + 1 - lead of several.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from rewriters.capture import batch_shapes as shapes
from rewriters.capture.batching import Batching, Rule, Shape, aten, operand_list
from rewriters.graph.nodes import AxisError, call_argument, op_name, operand
from rewriters.graph.op_sets import NATIVE_NORMS, RESHAPES, SPLITS

# Work on the last dimensions of their first operand, whatever the others are.
LAST = frozenset("linear embedding".split())
POINTWISE = frozenset(
    "to _to_copy clone contiguous detach alias dropout type_as zeros_like ones_like full_like masked_fill where "
    "lift_fresh_copy alpha_dropout rand_like".split()
)
SPATIAL_DIMS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
# Take dimensions: position and name of the argument, and its default (None: there has to be one).
DIMS: dict[str, tuple[int, str, Any]] = {
    "softmax": (1, "dim", None),
    "_softmax": (1, "dim", None),
    "log_softmax": (1, "dim", None),
    "split": (2, "dim", 0),
    "split_with_sizes": (2, "dim", 0),
    "chunk": (2, "dim", 0),
    "unbind": (1, "dim", 0),
    "select": (1, "dim", None),
    "slice": (1, "dim", 0),
    "narrow": (1, "dim", None),
    "sum": (1, "dim", None),
    "mean": (1, "dim", None),
    "amax": (1, "dim", None),
    "amin": (1, "dim", None),
    "var": (1, "dim", None),
    "linalg_vector_norm": (2, "dim", None),
    "cumsum": (1, "dim", None),
    "index_select": (1, "dim", None),
    "flip": (1, "dims", None),
    "roll": (2, "dims", None),
    "argmax": (1, "dim", None),
    "repeat_interleave": (2, "dim", None),
}
REDUCTIONS = frozenset("sum mean amax amin".split())


def rule_of(node: fx.Node) -> Rule:
    """The rule for an operation.

    Raises:
        AxisError: there is none.
    """
    name = op_name(node) if node.op == "call_function" else node.op
    if node.target is operator.getitem:
        return _part
    if name in RULES:
        return RULES[name]
    if name in DIMS:
        return _along
    if name in POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    raise AxisError(f"no rule for doing {name} for several images at once")


def _pointwise(work: Batching, node: fx.Node) -> fx.Node:
    count = len(work.shape(node).rest)
    args = fx.map_arg(node.args, lambda n: work.trailing(n, count))
    return work.emit(node.target, *args, **work.mapped(node.kwargs))


def _last(work: Batching, node: fx.Node) -> fx.Node:
    _only(work, node, operand(node, 1 if op_name(node) == "embedding" else 0))
    return work.emit(node.target, *work.mapped(node.args), **work.mapped(node.kwargs))


def _norm(work: Batching, node: fx.Node) -> fx.Node:
    sizes: Any = node.args[1]
    if len(sizes) > len(work.shape(operand(node)).rest):
        raise AxisError(f"{op_name(node)} works on all dimensions of an image")
    return _last(work, node)


def _only(work: Batching, node: fx.Node, only: fx.Node) -> None:
    """Refuse an operation of which any other operand depends on the image."""
    if any(n in work.batched and n is not only for n in node.all_input_nodes):
        raise AxisError(f"{op_name(node)} takes a parameter that depends on the image")


def _view(work: Batching, node: fx.Node) -> fx.Node:
    source = operand(node)
    if source not in work.batched or isinstance(node.args[-1], torch.dtype):
        raise AxisError(f"{op_name(node)} takes more than a shape")
    return shapes.regroup(work, node)


def _part(work: Batching, node: fx.Node) -> fx.Node:
    source = operand(node)
    if op_name(source) in SPLITS and len(source.meta["val"]) == 1:
        return work.env[operand(source)]
    new = work.emit(operator.getitem, work.env[source], node.args[1])
    return work.compact(new, node) if source in work.tuples_in_front else new


def _along(work: Batching, node: fx.Node) -> fx.Node:
    """An operation along given dimensions of its first operand."""
    place, keyword, default = DIMS[op_name(node)]
    dims = call_argument(node, place, keyword, default)
    source = operand(node)
    _only(work, node, source)
    rank = len(work.shape(source).sizes)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        if op_name(node) not in REDUCTIONS:
            raise AxisError(f"{op_name(node)} along no dimension")
        dims = list(range(rank))
    several = isinstance(dims, (list, tuple))
    places = [d % rank for d in (dims if several else [dims])]
    if op_name(node) == "select" and places == [0] and work.shape(source).rest == work.shape(node).rest:
        return work.env[source]
    whole = not work.shape(source).lead or 0 in places
    first = work.in_front(source) if whole else work.env[source]
    moved: Any = [d + 1 if whole else d for d in places]
    moved = moved if several else moved[0]
    args = [work.mapped(a) for a in node.args]
    kwargs = {k: work.mapped(v) for k, v in node.kwargs.items() if k != keyword}
    args[0] = first
    if len(args) > place:
        args[place] = moved
    elif op_name(node) == "unbind":
        args.append(moved)
    else:
        kwargs[keyword] = moved
    new = work.emit(_with_dims(node.target), *args, **kwargs)
    if not whole:
        return new
    if isinstance(new.meta["val"], Tensor):
        return work.compact(new, node)
    work.tuples_in_front.add(node)
    return new


def _with_dims(target: Any) -> Any:
    """The form of a reduction that takes dimensions."""
    return {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}.get(target, target)


def _cat(work: Batching, node: fx.Node) -> fx.Node:
    operands = operand_list(node)
    rank = len(work.shape(node).sizes)
    dim = call_argument(node, 1, "dim", 0) % rank
    if len(operands) == 1:
        return work.env[operands[0]]
    if dim and work.shape(node).lead:
        return work.emit(aten.cat.default, [_in_place(work, n) for n in operands], dim)
    whole = [_repeated(work, n) for n in operands]
    return work.compact(work.emit(aten.cat.default, whole, dim + 1), node)


def _stack(work: Batching, node: fx.Node) -> fx.Node:
    operands = operand_list(node)
    dim = call_argument(node, 1, "dim", 0) % len(work.shape(node).sizes)
    whole = [_repeated(work, n) for n in operands]
    return work.compact(work.emit(aten.stack.default, whole, dim + 1), node)


def _repeated(work: Batching, node: fx.Node) -> fx.Node:
    """An operand with the batch in front, repeated for every image if it depends on none."""
    if node in work.batched:
        return work.in_front(node)
    alone = work.emit(aten.unsqueeze.default, work.env[node], 0)
    return work.emit(aten.expand.default, alone, [work.batch, *work.shape(node).sizes])


def _matmul(work: Batching, node: fx.Node) -> fx.Node:
    after = work.shape(node)
    operands = [operand(node, 0), operand(node, 1)]
    if any(len(work.shape(n).sizes) < 2 for n in operands):
        raise AxisError(f"{op_name(node)} multiplies a vector")
    narrow = len(after.sizes) == 2 and any(n in work.batched and work.shape(n).lead for n in operands)
    if narrow or (after.lead and len(after.sizes) == 2):
        whole = [work.in_front(n) if n in work.batched else work.env[n] for n in operands]
        return work.compact(work.emit(aten.matmul.default, *whole), node)
    return work.emit(aten.matmul.default, *(work.trailing(n, len(after.rest)) for n in operands))


def _einsum(work: Batching, node: fx.Node) -> fx.Node:
    equation: Any = node.args[0]
    operands = operand_list(node, 1)
    if "." in equation or "->" not in equation:
        raise AxisError(f"einsum of the form {equation} for several images at once")
    letter = next(c for c in "zyxwvutsrq" if c not in equation)
    inputs, output = equation.replace(" ", "").split("->")
    named = [letter + part if n in work.batched else part for part, n in zip(inputs.split(","), operands, strict=True)]
    whole = [work.in_front(n) if n in work.batched else work.env[n] for n in operands]
    return work.compact(work.emit(aten.einsum.default, f"{','.join(named)}->{letter}{output}", whole), node)


def _convolution(work: Batching, node: fx.Node) -> fx.Node:
    source = operand(node)
    _only(work, node, source)
    shape, after = work.shape(source), work.shape(node)
    if len(shape.sizes) == SPATIAL_DIMS[op_name(node)] + 1:
        return _on(work, node, work.in_front(source), after.sizes, after)
    if shape.lead:
        return work.emit(node.target, *work.mapped(node.args), **work.mapped(node.kwargs))
    folded = work.emit(aten.reshape.default, work.env[source], [-1, *shape.sizes[1:]])
    return _on(work, node, folded, after.sizes, after)


def _on(work: Batching, node: fx.Node, first: fx.Node, sizes: tuple[int, ...], after: Shape) -> fx.Node:
    """The operation on another first operand, its result brought into shape."""
    new = work.emit(node.target, first, *work.mapped(node.args[1:]), **work.mapped(node.kwargs))
    return work.reshaped(new, after.rest) if len(new.meta["val"].shape) != len(after.rest) + 1 or sizes[0] != 1 else new


def _attention(work: Batching, node: fx.Node) -> fx.Node:
    after = work.shape(node)
    tensors = [operand(node, position) for position in range(3)]
    mask = call_argument(node, 3, "attn_mask", None)
    if len(after.sizes) not in (3, 4):
        raise AxisError("attention over several images at once, of tensors of other than 3 or 4 dimensions")
    folds = len(after.sizes) == 4 and not after.lead
    if isinstance(mask, fx.Node) and mask in work.batched:
        raise AxisError("attention whose mask depends on the image")
    parts: list[fx.Node] = []
    for n in tensors:
        new = _repeated(work, n) if len(after.sizes) == 3 or folds else _in_place(work, n)
        parts.append(work.emit(aten.reshape.default, new, [-1, *work.shape(n).sizes[1:]]) if folds else new)
    args = [*parts, *work.mapped(node.args[3:])]
    kwargs = dict(work.mapped(node.kwargs))
    if folds and isinstance(mask, fx.Node) and len(work.shape(mask).sizes) == 4 and not work.shape(mask).lead:
        wide = work.emit(aten.reshape.default, _repeated(work, mask), [-1, *work.shape(mask).sizes[1:]])
        if len(node.args) > 3:
            args[3] = wide
        else:
            kwargs["attn_mask"] = wide
    new = work.emit(node.target, *args, **kwargs)
    if folds:
        return work.reshaped(new, after.rest)
    return work.compact(new, node) if len(after.sizes) == 3 else new


def _in_place(work: Batching, node: fx.Node) -> fx.Node:
    """An operand that begins with a dimension of size 1, with the batch in its place."""
    if node in work.batched:
        return work.env[node]
    return work.emit(aten.expand.default, work.env[node], [work.batch, *work.shape(node).sizes[1:]])


def _index(work: Batching, node: fx.Node) -> fx.Node:
    source = operand(node)
    indices: Any = node.args[1]
    _only(work, node, source)
    given = [at for at, index in enumerate(indices) if index is not None]
    if given != list(range(given[0], given[-1] + 1)):
        raise AxisError("an index into dimensions that are not neighbours")
    if any(i is not None and i.meta["val"].dtype == torch.bool for i in indices):
        raise AxisError("an index by a mask")
    new = [None if i is None else work.env[i] for i in indices]
    if work.shape(source).lead and given[0] > 0:
        return work.emit(aten.index.Tensor, work.env[source], new)
    return work.compact(work.emit(aten.index.Tensor, work.in_front(source), [None, *new]), node)


def _pad(work: Batching, node: fx.Node) -> fx.Node:
    source = operand(node)
    pads: Any = node.args[1]
    inside = len(pads) // 2 <= len(work.shape(source).rest)
    first = work.env[source] if inside else work.in_front(source)
    new = work.emit(node.target, first, *work.mapped(node.args[1:]), **work.mapped(node.kwargs))
    return new if inside else work.compact(new, node)


def _interpolate(work: Batching, node: fx.Node) -> fx.Node:
    source = operand(node)
    if not work.shape(source).lead:
        raise AxisError(f"{op_name(node)} of several tensors of one image")
    return work.emit(node.target, *work.mapped(node.args), **work.mapped(node.kwargs))


def _made(work: Batching, node: fx.Node) -> fx.Node:
    """A tensor of a given shape; only type and device of its first operand count."""
    source = operand(node)
    _only(work, node, source)
    sizes = [work.batch, *work.shape(node).rest]
    return work.emit(node.target, work.env[source], sizes, *work.mapped(node.args[2:]), **work.mapped(node.kwargs))


def _added(work: Batching, node: fx.Node) -> fx.Node:
    """Rows that are added to rows at known places, or replace them."""
    base, places, rows = (operand(node, position) for position in (0, 2, 3))
    dim: Any = node.args[1]
    if places in work.batched:
        raise AxisError(f"{op_name(node)} at places that depend on the image")
    operands = [_repeated(work, n) for n in (base, rows)]
    whole_dim = dim % len(work.shape(node).sizes) + 1
    new = work.emit(node.target, operands[0], whole_dim, work.env[places], operands[1], **work.mapped(node.kwargs))
    return work.compact(new, node)


RULES: dict[str, Rule] = {
    **dict.fromkeys(LAST, _last),
    **dict.fromkeys(NATIVE_NORMS, _norm),
    **dict.fromkeys(RESHAPES, _view),
    **dict.fromkeys(SPATIAL_DIMS, _convolution),
    **dict.fromkeys(("permute", "t", "numpy_T", "movedim"), shapes.permute),
    **dict.fromkeys(("transpose", "swapaxes"), shapes.transpose),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("expand", "expand_as"), shapes.expand),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "avg_pool2d", "max_pool2d"), _interpolate),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _made),
    **dict.fromkeys(("index_add", "index_copy"), _added),
    "cat": _cat,
    "stack": _stack,
    "unsqueeze": shapes.unsqueeze,
    "squeeze": shapes.regroup,
    "repeat": shapes.repeat,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "index": _index,
}
