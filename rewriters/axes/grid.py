"""Grid: where the tokens of a stream stand once they are moved about as a grid (windows, shifts, padding, channels first).

Start at :func:`track`. The rule table (``table.py``) keeps a token axis whole, since pruned tokens have no grid. Here
all tokens are there, and an axis may be cut and folded: :class:`Placed` says along what each dimension of a value runs,
and by which :class:`Moves` a number for each token [B, N] gets to the places of the tokens in it. ``detect/streams.py``
tells windows by it, ``insert/grid_excursions.py`` carries along which tokens are alive and what attention says about
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

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
from rewriters.axes.parts import PREFIX, reduce
from rewriters.axes.table import EVERY_POSITION, RULES, elementwise, like_first
from rewriters.graph.nodes import AxisError, call_argument, example_shape, normal_dim, op_name, tensor_operands

BATCH = Axis("batch", "grid")
TOKENS = Axis("tokens", "grid")

VIEWS = frozenset("view reshape _unsafe_view flatten unflatten unsqueeze squeeze reshape_as view_as".split())
PARTS = frozenset("chunk split split_with_sizes unbind".split())
# They mix tokens in a way that leaves samples apart.
SCATTERS = frozenset("masked_scatter index_put index_put_ roll pad constant_pad_nd".split())
MIXING = (EVERY_POSITION | {"conv1d", "conv2d"}) - SCATTERS
WHOLE_MAPS = frozenset("conv1d conv2d avg_pool1d avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_avg_pool1d".split())


@dataclass(frozen=True)
class Moves:
    """How a number for each token is moved to the places that its token has in a value; equal moves are equal.

    kind: "start" (``[B, N]``, ``details`` says of which tokens), "view", "permute" (``details``: the dimensions) or "move"
    (``details``: an operation that takes its entries from elsewhere, with its further arguments).
    shape: in the example; dimensions that run along no axis have size 1. like: a value of the shape that a view leads to,
    but for the sizes ``beside`` that run along no axis.
    """

    kind: Literal["start", "view", "permute", "move"]
    shape: tuple[int, ...]
    before: Moves | None = None
    details: tuple[Any, ...] = ()
    like: fx.Node | None = field(default=None, compare=False)
    beside: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Placed:
    """A value that is computed from the tokens of a stream.

    labels: of its dimensions; None where that is not known. moves: of the token that each place of the value belongs to;
    None where places belong to no single token, since tokens were mixed. parts: it is a list of parts of a value like this.
    """

    labels: Labels | None
    moves: Moves | None
    parts: bool = False


@dataclass(frozen=True)
class Lost:
    """A value of which it is not known where its tokens stand, and why."""

    reason: str


Known = Placed | Lost
MIXED = Placed(None, None)


def start(shape: tuple[int, ...], batch_dim: int, token_dim: int, source: object) -> Placed:
    """The tokens of a residual value ``[B, N, C]``, ``[N, B, C]`` or ``[B, C, N]``; ``source`` tells different tokens apart."""
    labels = [plain(n) for n in shape]
    labels[batch_dim] = (Factor(BATCH, shape[batch_dim]),)
    labels[token_dim] = (Factor(TOKENS, shape[token_dim]),)
    return Placed(tuple(labels), Moves("start", _sizes(tuple(labels)), None, (source, batch_dim, token_dim)))


def track(node: fx.Node, known: Mapping[fx.Node, Known]) -> Known | None:
    """Where tokens stand in ``node``, given its operands; None if it is computed from none of them."""
    # What attention adds to its scores says nothing of where its queries, keys and values stand.
    read = (
        node.args[:3] if op_name(node) == "attention" else node.all_input_nodes if op_name(node) != "sym_size" else ()
    )
    operands = [known[n] for n in read if n in known]  # type: ignore[index]
    if not operands:
        return None
    lost = next((o for o in operands if isinstance(o, Lost)), None)
    if lost is not None:
        return lost
    if any(isinstance(o, Placed) and o.labels is None for o in operands) and len(operands) == 1:
        return MIXED
    try:
        return _rule(node, {n: o for n in node.all_input_nodes if isinstance(o := known.get(n), Placed)})
    except AxisError as error:
        return Lost(f"{error} at {node.name}")
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        return Lost(f"{op_name(node)} in a form that is not followed ({error}) at {node.name}")


def _rule(node: fx.Node, known: Mapping[fx.Node, Placed]) -> Placed:
    name = op_name(node)
    if name == "getitem":
        return _part(node, known[node.args[0]])  # type: ignore[index]
    if RULES.get(name) in (elementwise, like_first) or name in ("cat", "concat", "stack", "expand_as"):
        return _together(node, known)
    if name == "attention":
        return _attention(node, known)
    first = node.args[0]
    if not isinstance(first, fx.Node) or first not in known or len(known) > 1:
        if name in MIXING:
            return MIXED
        raise AxisError(f"{name} of several values that are computed from tokens")
    own = known[first]
    if name in MIXING or name == "batch_norm":
        return _mixed(node, own)
    if own.labels is None:
        return MIXED
    if name in PARTS:
        return replace(own, parts=True)
    return _single(node, name, own, own.labels)


def _single(node: fx.Node, name: str, own: Placed, labels: Labels) -> Placed:
    """Operations with one operand that is computed from tokens."""
    shape = example_shape(node)
    if name in VIEWS:
        return _viewed(node, own, relabel_view(labels, shape, _divisible))
    if name == "expand":
        return _viewed(node, own, _expanded(labels, shape))
    if name in ("permute", "transpose", "t", "mT"):
        return _permuted(node, own, labels, _order(node, name, len(labels)))
    if name in ("softmax", "log_softmax"):
        if not is_plain(labels[normal_dim(call_argument(node, 1, "dim", -1), len(labels))]):
            raise AxisError(f"{name} over tokens")
        return own
    if name in ("linear", "layer_norm", "rms_norm") or (name == "matmul" and len(node.args) == 2):
        count = len(node.args[1]) if name in ("layer_norm", "rms_norm") else 1  # type: ignore[arg-type]
        return _channels(node, own, labels, count)
    if RULES.get(name) is reduce:
        return _reduced(node, name, own, labels)
    if name in ("select", "slice", "roll", "flip", "pad", "constant_pad_nd"):
        return _taken(node, name, own, labels)
    raise AxisError(f"it is not known where {name} takes tokens")


def _divisible(axis: Axis | None) -> bool:
    return axis is None or axis.kind == "tokens"


def _sizes(labels: Labels) -> tuple[int, ...]:
    """The sizes of what runs along an axis, of each dimension."""
    return tuple(math.prod(f.size for f in dim if f.axis is not None) for dim in labels)


def _viewed(node: fx.Node, own: Placed, labels: Labels) -> Placed:
    if own.moves is None:
        return Placed(labels, None)
    for size, dim in zip(node.meta["val"].shape, labels, strict=True):
        if isinstance(size, torch.SymInt) and is_plain(dim):
            raise AxisError("a size that depends on the inputs is 1 in the example, or no batch and no tokens")
    before = own.moves.before if own.moves.kind == "view" else own.moves
    assert before is not None
    sizes = _sizes(labels)
    if own.moves.shape == sizes:
        return Placed(labels, own.moves)
    if math.prod(before.shape) != math.prod(sizes):
        raise AxisError("tokens that are repeated or left out")
    if before.shape == sizes:
        return Placed(labels, before)
    beside = tuple(math.prod(f.size for f in dim if f.axis is None) for dim in labels)
    return Placed(labels, Moves("view", sizes, before, (), node, beside))


def _expanded(labels: Labels, shape: tuple[int, ...]) -> Labels:
    new = len(shape) - len(labels)
    return tuple(plain(n) if d < new or is_plain(labels[d - new]) else labels[d - new] for d, n in enumerate(shape))


def _order(node: fx.Node, name: str, rank: int) -> tuple[int, ...]:
    if name == "permute":
        return tuple(normal_dim(d, rank) for d in node.args[1])  # type: ignore[union-attr, arg-type]
    first, second = (-2, -1) if name in ("t", "mT") else node.args[1:3]
    order = list(range(rank))
    first, second = normal_dim(first, rank), normal_dim(second, rank)  # type: ignore[arg-type]
    order[first], order[second] = second, first
    return tuple(order)


def _permuted(node: fx.Node, own: Placed, labels: Labels, order: tuple[int, ...]) -> Placed:
    result = tuple(labels[d] for d in order)
    if own.moves is None:
        return Placed(result, None)
    along = [d for d in order if not is_plain(labels[d])]
    if along == sorted(along):
        return _viewed(node, own, result)
    return Placed(result, Moves("permute", _sizes(result), own.moves, order))


def _channels(node: fx.Node, own: Placed, labels: Labels, count: int) -> Placed:
    """The last dimensions are mixed, or replaced, and run along no axis; else tokens are mixed."""
    if not all(is_plain(dim) for dim in labels[len(labels) - count :]):
        return MIXED
    if len(example_shape(node)) != len(labels):
        raise AxisError("a product of another rank than its tokens")
    return Placed((*labels[:-1], plain(example_shape(node)[-1])), own.moves)


def _reduced(node: fx.Node, name: str, own: Placed, labels: Labels) -> Placed:
    """Some dimensions go, or become 1; over tokens the result is a mixture."""
    given = call_argument(node, 2 if name in ("linalg_vector_norm", "norm") else 1, "dim", None)
    if given is None or given == []:
        return MIXED
    gone = {normal_dim(d, len(labels)) for d in ([given] if isinstance(given, int) else given)}
    keep = len(example_shape(node)) == len(labels)
    result = tuple(plain(1) if d in gone else dim for d, dim in enumerate(labels) if keep or d not in gone)
    if all(is_plain(labels[d]) for d in gone):
        return _viewed(node, own, result)
    return Placed(result, None)


def _taken(node: fx.Node, name: str, own: Placed, labels: Labels) -> Placed:
    """Entries of some dimensions are dropped, moved, or come new."""
    shape = example_shape(node)
    touched = _touched(node, name, len(labels))
    along = [d for d in touched if not is_plain(labels[d])]
    if not touched or (name == "slice" and shape == tuple(map(dim_size, labels))):
        return own
    if not along:
        rest = list(labels)
        if name == "select":
            del rest[touched[0]]
            return _viewed(node, own, tuple(rest))
        return Placed(tuple(plain(n) if d in touched else labels[d] for d, n in enumerate(shape)), own.moves)
    if len(along) != len(touched) or any(f.axis is None or f.axis.kind != "tokens" for d in along for f in labels[d]):
        raise AxisError(f"{name} along a dimension that holds more than tokens")
    if name == "select":
        result = tuple(dim for d, dim in enumerate(labels) if d not in along)
    else:
        result = tuple((Factor(TOKENS, n),) if d in along else labels[d] for d, n in enumerate(shape))
    if own.moves is None:
        return Placed(result, None)
    arguments = node.args[1:2] if name in ("pad", "constant_pad_nd") else node.args[1:]
    return Placed(result, Moves("move", _sizes(result), own.moves, (node.target, _hashable(arguments))))


def _touched(node: fx.Node, name: str, rank: int) -> list[int]:
    if name in ("pad", "constant_pad_nd"):
        pads: Any = node.args[1]
        if name == "pad" and call_argument(node, 2, "mode", "constant") != "constant":
            raise AxisError("a pad that repeats tokens")
        return sorted({rank - 1 - at // 2 for at, n in enumerate(pads) if not isinstance(n, int) or n != 0})
    dims: Any = node.args[2 if name == "roll" else 1] if len(node.args) > (2 if name == "roll" else 1) else 0
    if node.kwargs or (name == "roll" and len(node.args) < 3):
        raise AxisError(f"{name} over all elements, or with named arguments")
    return sorted({normal_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)})


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple)) else value


def _together(node: fx.Node, known: Mapping[fx.Node, Placed]) -> Placed:
    """Values at the same places: element-wise, or side by side along a dimension that runs along no axis."""
    if all(p.labels is None for p in known.values()):
        return MIXED
    shape, name = example_shape(node), op_name(node)
    side = None
    if name in ("cat", "concat", "stack"):
        side = normal_dim(call_argument(node, 1, "dim", 0), len(shape))
    if side is not None and any(_has_tokens_at(p, side) for p in known.values()):
        return _strung(node, known, side, shape)
    merged: list[Dim] = list(unlabelled(shape))
    for operand in tensor_operands(node):
        own = known.get(operand)
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
    return _viewed(node, Placed(tuple(merged), _common(known, tuple(merged), node)), tuple(merged))


def _has_tokens_at(own: Placed, dim: int) -> bool:
    return own.labels is not None and len(own.labels) > dim and has_tokens(own.labels[dim])


def _strung(node: fx.Node, known: Mapping[fx.Node, Placed], side: int, shape: tuple[int, ...]) -> Placed:
    """Mixtures of tokens behind the first few of them, which are read and so never dropped."""
    labels: Labels | None = None
    for own in known.values():
        if own.labels is None or (own.moves is not None and dim_size(own.labels[side]) > PREFIX):
            raise AxisError(f"{op_name(node)} of tokens with others")
        pairs = enumerate(zip(labels or own.labels, own.labels, strict=True))
        if any(not same_axes(first, second) for d, (first, second) in pairs if d != side):
            raise AxisError(f"{op_name(node)} of tokens that stand at different places")
        labels = own.labels
    assert labels is not None
    return Placed((*labels[:side], (Factor(TOKENS, shape[side]),), *labels[side + 1 :]), None)


def _common(known: Mapping[fx.Node, Placed], labels: Labels, node: fx.Node) -> Moves | None:
    """The moves of all operands whose places belong to tokens; a mixture that is added to tokens leaves them in place."""
    found = {_viewed(node, p, labels).moves for p in known.values() if p.moves is not None}
    if len(found) > 1:
        raise AxisError(f"{op_name(node)} of tokens that were moved differently")
    return next(iter(found), None)


def _part(node: fx.Node, own: Placed) -> Placed:
    if not own.parts:
        raise AxisError("one of several results")
    if own.labels is None:
        return MIXED
    source: Any = node.args[0]
    dim = normal_dim(call_argument(source, 1 if op_name(source) == "unbind" else 2, "dim", 0), len(own.labels))
    if not is_plain(own.labels[dim]):
        raise AxisError(f"{op_name(source)} along tokens")
    shape = example_shape(node)
    kept = [plain(shape[dim])] if op_name(source) != "unbind" else []
    labels = (*own.labels[:dim], *kept, *own.labels[dim + 1 :])
    return _viewed(node, replace(own, parts=False), labels)


def _mixed(node: fx.Node, own: Placed) -> Placed:
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
        return Placed((labels[0], plain(shape[1]), *labels[2:]), own.moves)
    return Placed((labels[0], plain(shape[1]), *((Factor(TOKENS, n),) for n in shape[2:])), None)


def _is_pointwise(node: fx.Node, shape: tuple[int, ...], labels: Labels) -> bool:
    weight: Any = node.args[1]
    padding = call_argument(node, 4, "padding", 0)
    padded = any(padding) if isinstance(padding, (list, tuple)) else padding
    return set(example_shape(weight)[2:]) == {1} and not padded and shape[2:] == tuple(map(dim_size, labels[2:]))


def _attention(node: fx.Node, known: Mapping[fx.Node, Placed]) -> Placed:
    """What attention yields stands where its queries stand."""
    query, value = node.args[0], node.args[2]
    own = known.get(query)  # type: ignore[arg-type]
    if own is None or own.labels is None:
        return MIXED
    width = example_shape(value)[3]  # type: ignore[arg-type]
    return Placed((*own.labels[:3], plain(width)), own.moves)


def is_grid_of(known: Known | None) -> bool:
    """Whether ``known`` are queries or keys ``[B', H, N', D]`` of tokens, of which each row belongs to one sample."""
    if not isinstance(known, Placed) or known.labels is None:
        return False
    batch, heads, tokens, width = known.labels
    first = batch[0].axis
    return is_plain(heads) and is_plain(width) and has_tokens(tokens) and first is not None and first.kind == "batch"
