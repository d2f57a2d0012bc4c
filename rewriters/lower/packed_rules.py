"""How operations run on packed rows: the rule table of ``packing.py``.

Start at :data:`RULES`. A packed value has 1 where the padded one has the batch and T, the rows of all samples, where that has
tokens. An operation that treats every token by itself computes the same on both, so most rules only say what becomes of the
other operands and of sizes. A rule changes its node in place; :class:`NotPacked` says why it cannot.

An operation without a rule runs on the padded form.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.node import Argument

from madtp.tokens import packing as runtime
from madtp.tokens import state as padded_runtime
from rewriters.axes.arguments import dims_argument, items
from rewriters.axes.labels import Dim, LabelMap, Labels, axes_of, has_tokens, is_plain
from rewriters.axes.sources import Source
from rewriters.graph.nodes import call_argument, example_shape, is_tensor, normal_dim, op_name
from rewriters.graph.op_sets import CASTS, CONCATENATIONS, COPIES, DRAWS, ELEMENTWISE, SIZED_VIEWS, VECTOR_NORMS

aten = torch.ops.aten


class NotPacked(Exception):
    """An operation cannot run on packed rows; the message says why."""


@dataclass(frozen=True)
class Layout:
    """Where a value has its samples and its tokens.

    Attributes:
        token_dim: The dimension of the tokens.
        batch_dim: The dimension of the samples; ``token_dim`` where both are folded into one.
        heads: Rows of each sample at ``batch_dim``, where heads are folded into the batch.
        source: The token state.
        tokens_first: Where both are folded: whether tokens are the outer factor.
    """

    token_dim: int
    batch_dim: int
    heads: int
    source: Source
    tokens_first: bool = False

    @property
    def folded(self) -> bool:
        """Whether samples and tokens are folded into one dimension."""
        return self.token_dim == self.batch_dim

    def stands_at(self, token_dim: object, batch_dim: object) -> bool:
        """Whether tokens and samples have these dimensions to themselves."""
        return self.heads == 1 and not self.folded and (self.token_dim, self.batch_dim) == (token_dim, batch_dim)


def layout_of(labels: Labels) -> Layout | None:
    """The layout of a value that has one packed form; None if it has none, as an attention map of tokens and tokens."""
    along = [position for position, dim in enumerate(labels) if has_tokens(dim)]
    if len(along) != 1:
        return None
    token_dim = along[0]
    factors = [f for f in labels[token_dim] if f.axis is not None or f.size != 1]
    source = next(f.axis.source for f in factors if f.axis is not None and f.axis.kind == "tokens")
    kinds = [None if f.axis is None else f.axis.kind for f in factors]
    batches = [position for position, dim in enumerate(labels) if any(a.kind == "batch" for a in axes_of(dim))]
    if sorted(map(str, kinds)) == ["batch", "tokens"] and batches == [token_dim]:
        return Layout(token_dim, token_dim, 1, source, tokens_first=kinds[0] == "tokens")
    if kinds != ["tokens"] or len(batches) != 1:
        return None
    first, *others = labels[batches[0]]
    if first.axis is None or first.axis.kind != "batch" or any(f.axis is not None for f in others):
        return None
    return Layout(token_dim, batches[0], math.prod(f.size for f in others), source)


@dataclass(frozen=True)
class PackedNode:
    """A node whose operands along tokens are packed already.

    Attributes:
        graph: The graph.
        node: The node.
        labels: Labels of all nodes, in the padded form.
        state: Yields the node of a token state.
    """

    graph: fx.Graph
    node: fx.Node
    labels: LabelMap
    state: Callable[[Source], fx.Node]

    def layout(self) -> Layout:
        """The layout of the result."""
        known = self.labels.tensor(self.node)
        layout = None if known is None else layout_of(known)
        if layout is None:
            raise NotPacked(f"{op_name(self.node)} gives a value without a packed form")
        return layout

    def runs_along(self, operand: fx.Node) -> bool:
        """Whether an operand runs along tokens, and so is packed."""
        known = self.labels.get(operand)
        return known is not None and known.any_tokens()

    def insert(self, target: Callable[..., object], *args: Argument) -> fx.Node:
        """A call in front of the node."""
        with self.graph.inserting_before(self.node):
            return self.graph.call_function(target, args)


Rule = Callable[[PackedNode], None]


def as_it_is(packed: PackedNode) -> None:
    """Each row by itself; all other operands are parameters."""
    for value in packed.node.all_input_nodes:
        if is_tensor(value) and not packed.runs_along(value) and value.op != "get_attr":
            raise NotPacked(f"{op_name(packed.node)} takes a value that may differ from sample to sample")


def with_parameters(packed: PackedNode) -> None:
    """Each row by itself, with operands that the rule of the padded form knows to be the same for all samples."""


def reduction(packed: PackedNode) -> None:
    """Mixes values along dimensions that are neither batch nor tokens."""
    own = packed.labels.of(packed.node.args[0])
    position = 2 if op_name(packed.node) in VECTOR_NORMS else 1
    dims = dims_argument(packed.node, position, len(own))
    if not dims or not all(is_plain(own[dim]) for dim in dims):
        raise NotPacked(f"{op_name(packed.node)} along the tokens or the batch")


def elementwise(packed: PackedNode) -> None:
    """Operands that belong to a sample, or to an original position, are read row by row."""
    layout, node = packed.layout(), packed.node
    rank = len(example_shape(node))
    for side in list(node.all_input_nodes):
        if packed.runs_along(side):
            continue
        if side.target in (padded_runtime.align, padded_runtime.realign):
            node.replace_input_with(side, _aligned_rows(packed, side, layout))
        elif is_tensor(side):
            _broadcast_side_input(packed, side, layout, rank)


def _aligned_rows(packed: PackedNode, side: fx.Node, layout: Layout) -> fx.Node:
    if layout.heads != 1 or layout.folded:
        raise NotPacked(f"{op_name(packed.node)} reads a side input where the batch is folded")
    state = packed.state(layout.source)
    if side.target is padded_runtime.realign:
        return packed.insert(runtime.to_rows, side, state, layout.token_dim, layout.batch_dim)
    values, aligned_state, dim, batch_dim, rank, *_ = side.args
    if aligned_state is not state or (dim, batch_dim) != (layout.token_dim, layout.batch_dim):
        raise NotPacked(f"{op_name(packed.node)} reads a side input along another dimension")
    return packed.insert(runtime.side_input_rows, values, state, dim, batch_dim, rank)


def _broadcast_side_input(packed: PackedNode, side: fx.Node, layout: Layout, rank: int) -> None:
    shape = example_shape(side)
    sizes = (1,) * (rank - len(shape)) + shape
    if sizes[layout.token_dim] != 1:
        raise NotPacked(f"{op_name(packed.node)} takes an operand with a value for each token that is not aligned")
    if sizes[layout.batch_dim] == 1:
        return
    if layout.heads != 1:
        raise NotPacked(
            f"{op_name(packed.node)} takes an operand with a value for each sample where heads are folded in"
        )
    places = (layout.token_dim, layout.batch_dim, rank)
    rows = packed.insert(runtime.sample_rows, side, packed.state(layout.source), *places)
    packed.node.replace_input_with(side, rows)


def matrix_product(packed: PackedNode) -> None:
    """A product with a matrix that is the same for all samples."""
    for factor in packed.node.all_input_nodes:
        if packed.runs_along(factor) or not is_tensor(factor):
            continue
        if any(size != 1 for size in example_shape(factor)[:-2]):
            raise NotPacked(f"{op_name(packed.node)} multiplies each sample by a matrix of its own")
    packed.layout()


def concatenation(packed: PackedNode) -> None:
    """Along a dimension that is neither batch nor tokens; operands are read as those of an element-wise operation."""
    known = packed.labels.of(packed.node)
    dim = normal_dim(call_argument(packed.node, 1, "dim", 0), len(known))
    if not is_plain(known[dim]):
        raise NotPacked("a concatenation along the tokens or the batch")
    elementwise(packed)


def view(packed: PackedNode) -> None:
    """Sizes of the batch become 1, those of tokens the number of rows."""
    node, known = packed.node, packed.labels.of(packed.node)
    source = packed.layout().source
    if layout_of(packed.labels.of(node.args[0])) is None:
        raise NotPacked("a view of a value without a packed form")
    sizes = zip(known, items(node, 1), strict=True)
    node.target = aten.reshape.default
    node.update_arg(1, [_size(packed, source, dim, size) for dim, size in sizes])


def unflatten(packed: PackedNode) -> None:
    """A view that splits one dimension."""
    node, known = packed.node, packed.labels.of(packed.node)
    source, before = packed.layout().source, packed.labels.of(node.args[0])
    if layout_of(before) is None:
        raise NotPacked("a view of a value without a packed form")
    dim, sizes = normal_dim(call_argument(node, 1, "dim", 0), len(before)), items(node, 2)
    parts = zip(known[dim : dim + len(sizes)], sizes, strict=True)
    node.update_arg(2, [_size(packed, source, part, size) for part, size in parts])


def _size(packed: PackedNode, source: Source, dim: Dim, size: Argument) -> Argument:
    """The size of a dimension in the packed form, in which the state of the tokens has no padding."""
    if is_plain(dim):
        return size
    kinds = {axis.kind for axis in axes_of(dim)}
    if kinds == {"batch", "tokens"}:
        return packed.insert(runtime.total_rows, packed.state(source))
    entries = runtime.row_entries if kinds == {"tokens"} else runtime.batch_entries
    number = packed.insert(entries, packed.state(source))
    heads = math.prod(f.size for f in dim if f.axis is None)
    return number if heads == 1 else packed.insert(operator.mul, number, heads)


def flatten(packed: PackedNode) -> None:
    """Neighbouring dimensions are joined, whatever their sizes."""
    packed.layout()


def same_shape(packed: PackedNode) -> None:
    """A view to the shape of another packed value."""
    packed.layout()
    if not all(packed.runs_along(n) for n in packed.node.all_input_nodes if is_tensor(n)):
        raise NotPacked(f"{op_name(packed.node)} takes the shape of a value that is not packed")


def expand(packed: PackedNode) -> None:
    """Sizes of batch and tokens stay as they are."""
    packed.layout()
    known = packed.labels.of(packed.node)
    sizes = items(packed.node, 1)
    packed.node.update_arg(1, [size if is_plain(dim) else -1 for dim, size in zip(known, sizes, strict=True)])


def repeat(packed: PackedNode) -> None:
    """Copies along dimensions that are neither batch nor tokens."""
    known = packed.labels.of(packed.node)
    counts = items(packed.node, 1)
    if any(not is_plain(dim) and count != 1 for dim, count in zip(known, counts, strict=True)):
        raise NotPacked("a repetition of tokens or samples")
    packed.layout()


def squeeze(packed: PackedNode) -> None:
    """Dimensions that are named; a batch of one row must not go with those that are not."""
    if len(packed.node.args) < 2:
        raise NotPacked("squeeze of all dimensions of size 1")
    as_it_is(packed)


# Each row by itself. What they take besides rows is a parameter.
_ROWS = """
linear layer_norm rms_norm batch_norm embedding prelu conv1d conv2d index_select topk one_hot
view_as_complex view_as_real permute transpose t mT unsqueeze select slice split split_with_sizes chunk unbind getitem
repeat_interleave addmm
""".split()

_REDUCTIONS = "mean sum amax amin var any all linalg_vector_norm norm softmax log_softmax cumsum".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ROWS, with_parameters),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(("gather", "scatter", "stack"), as_it_is),
    **dict.fromkeys(ELEMENTWISE | DRAWS | CASTS | COPIES | {"expand_as"}, elementwise),
    **dict.fromkeys(("matmul", "bmm", "mm"), matrix_product),
    **dict.fromkeys(CONCATENATIONS, concatenation),
    **dict.fromkeys(SIZED_VIEWS, view),
    "unflatten": unflatten,
    "flatten": flatten,
    **dict.fromkeys(("reshape_as", "view_as"), same_shape),
    "expand": expand,
    "repeat": repeat,
    "squeeze": squeeze,
    "rowwise": as_it_is,
}

# Rules that know what to do with side inputs that insertion has gathered along the tokens.
ALIGNING: frozenset[Rule] = frozenset((elementwise, concatenation))
