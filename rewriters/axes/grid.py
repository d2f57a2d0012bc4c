"""Grid: where the tokens of a stream are once they are moved as a grid (windows, shifts, padding, channels first).

Start at :func:`track`. The rule table (``table.py``) keeps a token axis whole, since pruned tokens have no grid. Here
all tokens are there, and an axis may be cut and folded; ``token_moves.py`` has the data that say where they stand.
``detect/windows.py`` tells windows by it; ``insert/dense_sections.py`` carries along which tokens are alive and what
attention says about them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from rewriters.axes.arguments import dim_argument, dims_argument, items
from rewriters.axes.labels import (
    Axis,
    Dim,
    Factor,
    Labels,
    dim_size,
    has_tokens,
    is_plain,
    plain,
    relabel_view,
    unlabelled,
)
from rewriters.axes.outcome import same_axes
from rewriters.axes.slice_rules import PREFIX, reduce
from rewriters.axes.table import EVERY_POSITION, RULES, elementwise, like_first
from rewriters.axes.token_moves import (
    MIXED,
    TOKENS,
    Permuted,
    Regrouped,
    Taken,
    TokenMoves,
    TrackedValue,
    Tracking,
    UntrackedValue,
    axis_sizes,
)
from rewriters.graph.nodes import (
    AxisError,
    call_argument,
    example_shape,
    ints_argument,
    normal_dim,
    op_name,
    operand,
    permutation,
    tensor_operands,
)
from rewriters.graph.op_sets import CONCATENATIONS, NORMS, PADS, PARTS, PERMUTATIONS, VECTOR_NORMS, VIEWS

# These move or write tokens without mixing them.
SCATTERS = PADS | frozenset("masked_scatter index_put index_put_ roll".split())
# These mix the tokens of a sample, but not samples.
MIXING = (EVERY_POSITION | {"conv1d", "conv2d"}) - SCATTERS
# The results of these are maps ``[B, C, ...]`` again.
WHOLE_MAPS = frozenset("conv1d conv2d avg_pool1d avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_avg_pool1d".split())


def track(node: fx.Node, known: Mapping[fx.Node, Tracking]) -> Tracking | None:
    """Find where the tokens of a stream are in ``node``.

    Args:
        node: The operation.
        known: Where they are in earlier nodes.

    Returns:
        None if the operation reads no tokens of the stream.
    """
    # A mask of attention does not say where its queries, keys and values stand.
    read: Sequence[object] = node.all_input_nodes
    if op_name(node) == "attention":
        read = node.args[:3]
    elif op_name(node) == "sym_size":
        read = ()
    operands = [known[n] for n in read if isinstance(n, fx.Node) and n in known]
    if not operands:
        return None
    untracked = next((o for o in operands if isinstance(o, UntrackedValue)), None)
    if untracked is not None:
        return untracked
    if any(isinstance(o, TrackedValue) and o.labels is None for o in operands) and len(operands) == 1:
        return MIXED
    try:
        return _rule(node, {n: o for n in node.all_input_nodes if isinstance(o := known.get(n), TrackedValue)})
    except AxisError as error:
        return UntrackedValue(f"{error} at {node.name}")
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        return UntrackedValue(f"{op_name(node)} in a form that is not followed ({error}) at {node.name}")


def _rule(node: fx.Node, known: Mapping[fx.Node, TrackedValue]) -> TrackedValue:
    name = op_name(node)
    if name == "getitem":
        return _list_entry(node, known[operand(node, 0)])
    if RULES.get(name) in (elementwise, like_first) or name in CONCATENATIONS | {"stack", "expand_as"}:
        return _combined(node, known)
    if name == "attention":
        return _attention(node, known)
    first = node.args[0]
    if not isinstance(first, fx.Node) or first not in known or len(known) > 1:
        if name in MIXING:
            return MIXED
        raise AxisError(f"{name} of several values that are computed from tokens")
    own = known[first]
    if name in MIXING or name == "batch_norm":
        return _convolved(node, own)
    if own.labels is None:
        return MIXED
    if name in PARTS:
        return replace(own, is_list=True)
    return _single(node, name, own, own.labels)


def _single(node: fx.Node, name: str, own: TrackedValue, labels: Labels) -> TrackedValue:
    """Operations with one operand that is computed from tokens."""
    shape = example_shape(node)
    if name in VIEWS:
        return _viewed(node, own, relabel_view(labels, shape, _divisible))
    if name == "expand":
        return _viewed(node, own, _expanded(labels, shape))
    if name in PERMUTATIONS | {"t", "mT"}:
        return _permuted(node, own, labels, permutation(node, len(labels)))
    if name in ("softmax", "log_softmax"):
        if not is_plain(labels[dim_argument(node, 1, len(labels), default=-1)]):
            raise AxisError(f"{name} over tokens")
        return own
    if name in NORMS | {"linear"} or (name == "matmul" and len(node.args) == 2):
        count = len(items(node, 1)) if name in NORMS else 1
        return _channels(node, own, labels, count)
    if RULES.get(name) is reduce:
        return _reduced(node, name, own, labels)
    if name in PADS | {"select", "slice", "roll", "flip"}:
        return _moved(node, name, own, labels)
    raise AxisError(f"it is not known where {name} takes tokens")


def _divisible(axis: Axis | None) -> bool:
    return axis is None or axis.kind == "tokens"


def _viewed(node: fx.Node, own: TrackedValue, labels: Labels) -> TrackedValue:
    if own.moves is None:
        return TrackedValue(labels, None)
    for size, dim in zip(node.meta["val"].shape, labels, strict=True):
        if isinstance(size, torch.SymInt) and is_plain(dim):
            raise AxisError("a size that depends on the inputs is 1 in the example, or no batch and no tokens")
    before = own.moves.before if isinstance(own.moves, Regrouped) else own.moves
    sizes = axis_sizes(labels)
    if own.moves.shape == sizes:
        return TrackedValue(labels, own.moves)
    if math.prod(before.shape) != math.prod(sizes):
        raise AxisError("tokens that are repeated or left out")
    if before.shape == sizes:
        return TrackedValue(labels, before)
    plain_sizes = tuple(math.prod(f.size for f in dim if f.axis is None) for dim in labels)
    return TrackedValue(labels, Regrouped(before, sizes, like=node, plain_sizes=plain_sizes))


def _expanded(labels: Labels, shape: tuple[int, ...]) -> Labels:
    new = len(shape) - len(labels)
    return Labels(plain(n) if d < new or is_plain(labels[d - new]) else labels[d - new] for d, n in enumerate(shape))


def _permuted(node: fx.Node, own: TrackedValue, labels: Labels, order: tuple[int, ...]) -> TrackedValue:
    result = Labels(labels[d] for d in order)
    if own.moves is None:
        return TrackedValue(result, None)
    along = [d for d in order if not is_plain(labels[d])]
    if along == sorted(along):
        return _viewed(node, own, result)
    return TrackedValue(result, Permuted(own.moves, axis_sizes(result), order))


def _channels(node: fx.Node, own: TrackedValue, labels: Labels, count: int) -> TrackedValue:
    """The last dimensions are mixed, or replaced, and run along no axis; else tokens are mixed."""
    if not all(is_plain(dim) for dim in labels[len(labels) - count :]):
        return MIXED
    if len(example_shape(node)) != len(labels):
        raise AxisError("a product of another rank than its tokens")
    return TrackedValue(labels.with_dim(len(labels) - 1, plain(example_shape(node)[-1])), own.moves)


def _reduced(node: fx.Node, name: str, own: TrackedValue, labels: Labels) -> TrackedValue:
    """Reduces some dimensions; over tokens the result is a mixture."""
    gone = dims_argument(node, 2 if name in VECTOR_NORMS else 1, len(labels))
    if not gone:
        return MIXED
    keep = len(example_shape(node)) == len(labels)
    result = Labels(plain(1) if d in gone else dim for d, dim in enumerate(labels) if keep or d not in gone)
    if all(is_plain(labels[d]) for d in gone):
        return _viewed(node, own, result)
    return TrackedValue(result, None)


def _moved(node: fx.Node, name: str, own: TrackedValue, labels: Labels) -> TrackedValue:
    """Entries of some dimensions are dropped or moved, or new ones are added."""
    shape = example_shape(node)
    moved_dims = _moved_dims(node, name, len(labels))
    along = [d for d in moved_dims if not is_plain(labels[d])]
    if not moved_dims or (name == "slice" and shape == tuple(map(dim_size, labels))):
        return own
    if not along:
        if name == "select":
            return _viewed(node, own, labels.without_dim(moved_dims[0]))
        return TrackedValue(Labels(plain(n) if d in moved_dims else labels[d] for d, n in enumerate(shape)), own.moves)
    if len(along) != len(moved_dims) or any(
        f.axis is None or f.axis.kind != "tokens" for d in along for f in labels[d]
    ):
        raise AxisError(f"{name} along a dimension that holds more than tokens")
    if name == "select":
        result = Labels(dim for d, dim in enumerate(labels) if d not in along)
    else:
        result = Labels((Factor(TOKENS, n),) if d in along else labels[d] for d, n in enumerate(shape))
    if own.moves is None:
        return TrackedValue(result, None)
    arguments = node.args[1:2] if name in PADS else node.args[1:]
    if not isinstance(node.target, OpOverload):
        raise TypeError(f"{node.target} is not an operation of torch")
    return TrackedValue(result, Taken(own.moves, axis_sizes(result), node.target, _hashable(arguments)))


def _moved_dims(node: fx.Node, name: str, rank: int) -> list[int]:
    if name in PADS:
        pads = items(node, 1)
        if name == "pad" and call_argument(node, 2, "mode", "constant") != "constant":
            raise AxisError("a pad that repeats tokens")
        return sorted({rank - 1 - at // 2 for at, n in enumerate(pads) if not isinstance(n, int) or n != 0})
    position = 2 if name == "roll" else 1
    if node.kwargs or (name == "roll" and len(node.args) < 3):
        raise AxisError(f"{name} over all elements, or with named arguments")
    if len(node.args) <= position:
        return [0]
    return sorted({normal_dim(d, rank) for d in ints_argument(node, position, "dims")})


def _hashable(values: Sequence[Argument]) -> tuple[Argument, ...]:
    """``values`` with tuples in the place of lists, at every level."""
    return tuple(_hashable(value) if isinstance(value, (list, tuple)) else value for value in values)


def _combined(node: fx.Node, known: Mapping[fx.Node, TrackedValue]) -> TrackedValue:
    """Combines values at the same places: element by element, or along a dimension that runs along no axis."""
    if all(p.labels is None for p in known.values()):
        return MIXED
    shape, name = example_shape(node), op_name(node)
    side = None
    if name in CONCATENATIONS | {"stack"}:
        side = dim_argument(node, 1, len(shape), default=0)
    if side is not None and any(_has_tokens_at(p, side) for p in known.values()):
        return _concatenated(node, known, side, shape)
    merged: list[Dim] = list(unlabelled(shape))
    for tensor in tensor_operands(node):
        own = known.get(tensor)
        if own is None or own.labels is None:
            continue
        labels = list(own.labels)
        if name == "stack":
            labels.insert(side or 0, plain(1))
        for offset, dim in enumerate(reversed(labels), 1):
            if is_plain(dim):
                continue
            at = len(shape) - offset
            if at == side or not (is_plain(merged[at]) or same_axes(merged[at], dim)):
                raise AxisError(f"{name} of tokens that stand at different places")
            if dim_size(dim) != shape[at]:
                raise AxisError(f"{name} that repeats tokens")
            merged[at] = dim
    result = Labels(merged)
    return _viewed(node, TrackedValue(result, _common_moves(known, result, node)), result)


def _has_tokens_at(own: TrackedValue, dim: int) -> bool:
    return own.labels is not None and len(own.labels) > dim and has_tokens(own.labels[dim])


def _concatenated(
    node: fx.Node, known: Mapping[fx.Node, TrackedValue], side: int, shape: tuple[int, ...]
) -> TrackedValue:
    """Concatenates mixtures of tokens with the first few tokens, which are read and so never dropped."""
    labels: Labels | None = None
    for own in known.values():
        if own.labels is None or (own.moves is not None and dim_size(own.labels[side]) > PREFIX):
            raise AxisError(f"{op_name(node)} of tokens with others")
        pairs = enumerate(zip(labels or own.labels, own.labels, strict=True))
        if any(not same_axes(first, second) for d, (first, second) in pairs if d != side):
            raise AxisError(f"{op_name(node)} of tokens that stand at different places")
        labels = own.labels
    assert labels is not None
    return TrackedValue(labels.with_dim(side, (Factor(TOKENS, shape[side]),)), None)


def _common_moves(known: Mapping[fx.Node, TrackedValue], labels: Labels, node: fx.Node) -> TokenMoves | None:
    """The moves of all operands whose places belong to tokens; a mixture that is added to tokens leaves them in place."""
    found = {_viewed(node, p, labels).moves for p in known.values() if p.moves is not None}
    if len(found) > 1:
        raise AxisError(f"{op_name(node)} of tokens that were moved differently")
    return next(iter(found), None)


def _list_entry(node: fx.Node, own: TrackedValue) -> TrackedValue:
    if not own.is_list:
        raise AxisError("one of several results")
    if own.labels is None:
        return MIXED
    source = operand(node, 0)
    dim = dim_argument(source, 1 if op_name(source) == "unbind" else 2, len(own.labels), default=0)
    if not is_plain(own.labels[dim]):
        raise AxisError(f"{op_name(source)} along tokens")
    if op_name(source) == "unbind":
        labels = own.labels.without_dim(dim)
    else:
        labels = own.labels.with_dim(dim, plain(example_shape(node)[dim]))
    return _viewed(node, replace(own, is_list=False), labels)


def _convolved(node: fx.Node, own: TrackedValue) -> TrackedValue:
    """Maps ``[B, C, ...]`` keep their layout; those that see one place only keep their tokens."""
    labels, name = own.labels, op_name(node)
    if name == "batch_norm":
        # In training its statistics are of all tokens; what it yields for a place is still of the token there.
        return own if labels is not None and is_plain(labels[1]) else MIXED
    whole = labels is not None and is_plain(labels[1]) and not has_tokens(labels[0]) and not is_plain(labels[0])
    if name not in WHOLE_MAPS or not whole:
        return MIXED
    assert labels is not None
    shape = example_shape(node)
    if name in ("conv1d", "conv2d") and _is_pointwise(node, shape, labels):
        return TrackedValue(labels.with_dim(1, plain(shape[1])), own.moves)
    return TrackedValue(Labels((labels[0], plain(shape[1]), *((Factor(TOKENS, n),) for n in shape[2:]))), None)


def _is_pointwise(node: fx.Node, shape: tuple[int, ...], labels: Labels) -> bool:
    weight = operand(node, 1)
    padding = call_argument(node, 4, "padding", 0)
    padded = any(padding) if isinstance(padding, (list, tuple)) else padding
    return set(example_shape(weight)[2:]) == {1} and not padded and shape[2:] == tuple(map(dim_size, labels[2:]))


def _attention(node: fx.Node, known: Mapping[fx.Node, TrackedValue]) -> TrackedValue:
    """What attention yields stands where its queries stand."""
    own = known.get(operand(node, 0))
    if own is None or own.labels is None:
        return MIXED
    width = example_shape(operand(node, 2))[3]
    return TrackedValue(Labels((*own.labels[:3], plain(width))), own.moves)


def is_grid_of(known: Tracking | None) -> bool:
    """Whether ``known`` are queries or keys ``[B', H, N', D]`` of tokens, of which each row belongs to one sample."""
    if not isinstance(known, TrackedValue) or known.labels is None:
        return False
    batch, heads, tokens, width = known.labels
    first = batch[0].axis
    return is_plain(heads) and is_plain(width) and has_tokens(tokens) and first is not None and first.kind == "batch"
