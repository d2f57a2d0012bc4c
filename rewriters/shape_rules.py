"""Rules of operations that move, join and repeat dimensions; see ``rules.py`` for the table."""

from __future__ import annotations

from typing import Any

from torch import fx

from rewriters.axes import (
    AxisError,
    axes_of,
    dim_size,
    example_shape,
    has_tokens,
    is_plain,
    normal_dim,
    plain,
    relabel_view,
)
from rewriters.outcomes import LabelMap, Outcome, Resize, broadcast, call_argument, labels_of, op_name, require_plain


def transpose(node: fx.Node, labels: LabelMap) -> Outcome:
    """Two dimensions change places."""
    own = list(labels_of(node.args[0], labels))
    if op_name(node) in ("t", "numpy_T", "mT"):
        return Outcome(labels=tuple(own[:-2] + own[:-3:-1]))
    first, second = (normal_dim(d, len(own)) for d in node.args[1:3])  # type: ignore[arg-type]
    own[first], own[second] = own[second], own[first]
    return Outcome(labels=tuple(own))


def permute(node: fx.Node, labels: LabelMap) -> Outcome:
    """Dimensions in a new order."""
    own = labels_of(node.args[0], labels)
    return Outcome(labels=tuple(own[normal_dim(d, len(own))] for d in node.args[1]))  # type: ignore[union-attr, arg-type]


def unsqueeze(node: fx.Node, labels: LabelMap) -> Outcome:
    """A new dimension of size 1."""
    own = list(labels_of(node.args[0], labels))
    own.insert(normal_dim(node.args[1], len(own) + 1), plain(1))  # type: ignore[arg-type]
    return Outcome(labels=tuple(own))


def squeeze(node: fx.Node, labels: LabelMap) -> Outcome:
    """Dimensions of size 1 go."""
    own = labels_of(node.args[0], labels)
    dims = call_argument(node, 1, "dim", None)
    wanted = range(len(own)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {normal_dim(d, len(own)) for d in wanted}
    return Outcome(labels=tuple(x for d, x in enumerate(own) if not (d in gone and dim_size(x) == 1)))


def view(node: fx.Node, labels: LabelMap) -> Outcome:
    """view, reshape, flatten, unflatten: factors are regrouped, baked-in token counts are replaced."""
    own = labels_of(node.args[0], labels)
    shape = example_shape(node)
    result = relabel_view(own, shape)
    name = op_name(node)
    if name == "flatten":
        return Outcome(labels=result)
    argument, first = (2, normal_dim(node.args[1], len(own))) if name == "unflatten" else (1, 0)  # type: ignore[arg-type]
    sizes = node.args[argument]
    if not isinstance(sizes, (list, tuple)):
        raise AxisError("a view to another type")
    resizes: list[Resize] = []
    inferred = any(n == -1 for n in sizes if isinstance(n, int))
    for position, size in enumerate(sizes):
        dim = result[first + position]
        if not has_tokens(dim) or (isinstance(size, int) and size == -1):
            continue
        if len(dim) == 1:
            resizes.append(Resize(argument, position, dim[0].axis))
        elif inferred:
            raise AxisError("a view that infers one size while a folded token axis needs the same")
        else:
            inferred = True
            resizes.append(Resize(argument, position, None))
    return Outcome(labels=result, resizes=tuple(resizes))


def expand(node: fx.Node, labels: LabelMap) -> Outcome:
    """Dimensions of size 1 are repeated without a copy; others keep their size."""
    own = labels_of(node.args[0], labels)
    shape = example_shape(node)
    new = len(shape) - len(own)
    result = tuple(plain(n) if d < new or is_plain(own[d - new]) else own[d - new] for d, n in enumerate(shape))
    return Outcome(labels=result, resizes=tuple(Resize(1, d, None) for d, dim in enumerate(result) if has_tokens(dim)))


def repeat(node: fx.Node, labels: LabelMap) -> Outcome:
    """Copies along dimensions that run along no axis."""
    own = labels_of(node.args[0], labels)
    times = list(node.args[1])  # type: ignore[arg-type]
    new = len(times) - len(own)
    shape = example_shape(node)
    for dim, count in zip(own, times[new:], strict=True):
        if not is_plain(dim) and count != 1:
            raise AxisError(f"repeat along {axes_of(dim)}")
    return Outcome(
        labels=tuple(plain(n) if d < new or is_plain(own[d - new]) else own[d - new] for d, n in enumerate(shape))
    )


def cat(node: fx.Node, labels: LabelMap) -> Outcome:
    """Concatenation along a dimension that runs along no axis; the other dimensions must agree."""
    # torch lets an empty vector stand for "nothing" in a concatenation.
    listed: Any = node.args[0]
    operands = [n for n in listed if example_shape(n) != (0,)]
    shape = example_shape(node)
    dim = normal_dim(call_argument(node, 1, "dim", 0), len(shape))
    for operand in operands:
        require_plain((labels_of(operand, labels)[dim],), node)
    outcome = broadcast(node, operands, labels, shape)
    assert outcome.labels is not None
    return outcome


def stack(node: fx.Node, labels: LabelMap) -> Outcome:
    """Operands of equal labels along a new dimension."""
    operands = list(node.args[0])  # type: ignore[arg-type]
    shape = example_shape(node)
    dim = normal_dim(call_argument(node, 1, "dim", 0), len(shape))
    inner = shape[:dim] + shape[dim + 1 :]
    outcome = broadcast(node, operands, labels, inner)
    assert outcome.labels is not None
    return Outcome(labels=(*outcome.labels[:dim], plain(len(operands)), *outcome.labels[dim:]), aligns=outcome.aligns)
