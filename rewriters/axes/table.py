"""The rule table: how axis labels move through each ATen operation.

Start at :data:`RULES`, one row per operation, and :func:`apply`. A rule is a function from a node and the labels of its
inputs to an :class:`Outcome`: labels of the result, and the repairs that keep the operation correct once token axes are
shorter than they were captured (side inputs to align, baked-in sizes to replace, readouts to remap). Rules decide
nothing else and change nothing; ``insert/insert.py`` carries the repairs out, ``detect/streams.py`` only reads the
labels and readouts. An operation without a row, or a row that does not cover the labelled dimension, raises
:class:`AxisError`: it is never taken for element-wise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from madtp.tokens.attention import attention
from rewriters.axes import attention_map_rules as map_rules
from rewriters.axes.arguments import dim_argument, items, operand_list
from rewriters.axes.channel_rules import (
    batch_norm,
    conv1d,
    conv2d,
    einsum,
    index_select,
    one_hot,
    scatter,
    topk,
    view_as_complex,
    view_as_real,
)
from rewriters.axes.labels import (
    LabelMap,
    Labels,
    ResultLabels,
    dim_size,
    has_tokens,
    is_plain,
    plain,
    token_axis,
    unlabelled,
)
from rewriters.axes.outcome import (
    Align,
    Outcome,
    RenamedArgument,
    Rule,
    broadcast,
    elementwise_outcome,
    require_plain,
    require_unlabelled,
    same_axes,
)
from rewriters.axes.shape_rules import cat, expand, permute, repeat, reshape_as, squeeze, stack, unsqueeze, view
from rewriters.axes.slice_rules import (
    gather,
    getitem,
    index,
    masked_mean,
    reduce,
    repeat_interleave,
    select,
    size,
    slice_,
    split,
)
from rewriters.axes.sources import are_alike
from rewriters.graph.match import because
from rewriters.graph.node_record import rowwise_module
from rewriters.graph.nodes import AxisError, example_shape, op_name, operand, tensor_operands
from rewriters.graph.op_sets import CASTS, CONCATENATIONS, DRAWS, ELEMENTWISE, PARTS, SIZED_VIEWS


def elementwise(node: fx.Node, labels: LabelMap) -> Outcome:
    """Each element of the result depends on the elements at the same (broadcast) place only."""
    return elementwise_outcome(tensor_operands(node), labels, example_shape(node))


def like_first(node: fx.Node, labels: LabelMap) -> Outcome:
    """The first operand's values in another type; of the second only its type is read."""
    return Outcome(labels=labels.of(node.args[0]))


def fresh(node: fx.Node, labels: LabelMap) -> Outcome:
    """A new tensor of which the operand gives only type and device."""
    return Outcome(labels=unlabelled(example_shape(node)))


def prelu(node: fx.Node, labels: LabelMap) -> Outcome:
    """A slope for each entry of dimension 1, or one for all."""
    own, weight = labels.of(node.args[0]), operand(node, 1)
    require_unlabelled([weight], labels, node)
    if example_shape(weight)[0] > 1:
        require_plain(own[1:2], node)
    return Outcome(labels=own)


def last_dims(count: Callable[[fx.Node], int]) -> Rule:
    """Mixes the last ``count`` dimensions of the first operand, leaves the others alone; the result keeps the shape."""

    def rule(node: fx.Node, labels: LabelMap) -> Outcome:
        own = labels.of(node.args[0])
        mixed = count(node)
        require_plain(own[len(own) - mixed :], node)
        require_unlabelled(tensor_operands(node)[1:], labels, node)
        return Outcome(labels=own)

    return rule


def linear(node: fx.Node, labels: LabelMap) -> Outcome:
    """``[..., C] -> [..., C']``."""
    own = labels.of(node.args[0])
    require_plain(own[-1:], node)
    require_unlabelled(tensor_operands(node)[1:], labels, node)
    return Outcome(labels=own.with_dim(len(own) - 1, plain(example_shape(node)[-1])))


def matmul(node: fx.Node, labels: LabelMap) -> Outcome:
    """Contraction over a dimension that runs along no axis; batch dimensions broadcast."""
    first, second = (labels.of(node.args[i]) for i in (0, 1))
    if len(first) < 2 or len(second) < 2:
        raise AxisError("a matrix product with a vector")
    require_plain((first[-1], second[-2]), node)
    outer = broadcast([operand(node, 0), operand(node, 1)], labels, example_shape(node), skip=2)
    return Outcome(labels=Labels((*outer.labels[:-2], first[-2], second[-1])), aligns=outer.aligns)


def addmm(node: fx.Node, labels: LabelMap) -> Outcome:
    """``bias + [M, C] @ [C, C']``: a linear layer over tokens folded with the batch, its weight transposed."""
    bias, own = operand(node, 0), labels.of(node.args[1])
    require_plain(own[-1:], node)
    require_unlabelled([bias, node.args[2]], labels, node)
    if len(example_shape(bias)) > 1 and example_shape(bias)[0] != 1:
        raise AxisError("addmm adds a value to each row by its place")
    return Outcome(labels=Labels((own[0], plain(example_shape(node)[-1]))))


def along_dim(default: int) -> Rule:
    """Mixes one dimension (softmax, cumsum): it must run along no axis."""

    def rule(node: fx.Node, labels: LabelMap) -> Outcome:
        own = labels.of(node.args[0])
        require_plain((own[dim_argument(node, 1, len(own), default=default)],), node)
        return Outcome(labels=own)

    return rule


def embedding(node: fx.Node, labels: LabelMap) -> Outcome:
    """A row of the table for each index."""
    require_unlabelled(node.args[:1], labels, node)
    own = labels.of(node.args[1])
    return Outcome(labels=Labels((*own, plain(example_shape(node)[-1]))))


def attend(node: fx.Node, labels: LabelMap) -> Outcome:
    """Attention: the result runs along the queries; masks are aligned by the states of queries and keys."""
    query, key, value = (labels.of(node.args[i]) for i in range(3))
    require_plain((query[1], query[3], key[1], key[3], value[3]), node)
    states = {}
    for name, own in (("query_state", query), ("key_state", key)):
        axis = token_axis(own[2])
        if axis is not None:
            states[name] = axis
    values, keys = token_axis(value[2]), token_axis(key[2])
    if keys is not None and (values is None or not are_alike(values.source, keys.source)):
        raise AxisError("keys and values run along different tokens")
    batch = query[0] if not is_plain(query[0]) else key[0]
    result = Labels((batch, query[1], query[2], value[3]))
    mask = node.args[3] if len(node.args) > 3 else None
    if not isinstance(mask, fx.Node) or mask not in labels or not labels.of(mask).any_tokens():
        return Outcome(labels=result, states=states)
    aligns = _aligned_scores(mask, Labels((batch, query[1], query[2], key[2])), labels)
    return Outcome(labels=result, states=states, aligns=aligns, renamed=RenamedArgument(3, "present_mask"))


def _aligned_scores(mask: fx.Node, scores: Labels, labels: LabelMap) -> tuple[Align, ...]:
    """What makes a mask that is computed from pruned tokens run along queries and keys as the scores ``[B, H, Q, K]`` do."""
    given = labels.of(mask)
    own = Labels((*(plain(1),) * (4 - len(given)), *given))
    require_plain(own[1:2], mask)
    aligns = []
    for dim in (2, 3):
        axis, wanted = token_axis(own[dim]), token_axis(scores[dim])
        if axis == wanted or dim_size(own[dim]) == 1:
            continue
        if wanted is None or (axis is not None and labels.newer(axis, wanted) != wanted):
            raise AxisError("an attention mask that is computed from other tokens than queries and keys")
        aligns.append(Align(operand=mask, dim=dim, axis=wanted, batch_dim=0, rank=4, present=axis))
    return tuple(aligns)


def rowwise(node: fx.Node, labels: LabelMap) -> Outcome:
    """A submodule that works row by row (``capture/mixture_of_experts.py``): its results run along the rows of its operands."""
    rank = rowwise_module(node).rank
    per_operand = [labels.of(n) for n in operand_list(node, 0)]
    rows = list(next(own for own in per_operand if len(own) >= rank)[:rank])
    for own in per_operand:
        require_plain(own[rank:], node)
        for dim, label in enumerate(own[:rank]):
            if is_plain(rows[dim]):
                rows[dim] = label
    for own in per_operand:
        if not all(same_axes(a, b) or not has_tokens(b) for a, b in zip(own, rows, strict=False)):
            raise AxisError("operands of a module that works row by row run along different tokens")
    results = ResultLabels(Labels((*rows, *unlabelled(sizes))) for _, sizes in rowwise_module(node).results)
    return Outcome(labels=results)


# Read or write tokens by their place in the whole sequence or grid, so all of them have to be there.
EVERY_POSITION = frozenset(
    """
masked_scatter index_put index_put_ conv3d conv_transpose1d conv_transpose2d avg_pool1d avg_pool2d max_pool2d
adaptive_avg_pool1d adaptive_avg_pool2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_nearest2d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa pixel_shuffle pixel_unshuffle im2col grid_sampler roll pad
constant_pad_nd
""".split()
)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE | DRAWS, elementwise),
    **dict.fromkeys(CASTS, like_first),
    **dict.fromkeys(("new_empty", "new_full", "new_ones", "new_zeros"), fresh),
    "prelu": prelu,
    "attention": attend,
    "masked_mean": masked_mean,
    "shares": map_rules.shares,
    "total": map_rules.total,
    "weigh": map_rules.weigh,
    "rowwise": rowwise,
    "linear": linear,
    "einsum": einsum,
    "conv1d": conv1d,
    "conv2d": conv2d,
    "batch_norm": batch_norm,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    "index_select": index_select,
    "topk": topk,
    "one_hot": one_hot,
    "scatter": scatter,
    "gather": gather,
    "matmul": matmul,
    "bmm": matmul,
    "mm": matmul,
    "addmm": addmm,
    "layer_norm": last_dims(lambda node: len(items(node, 1))),
    "rms_norm": last_dims(lambda node: len(items(node, 1))),
    "softmax": along_dim(-1),
    "log_softmax": along_dim(-1),
    "cumsum": along_dim(-1),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "any", "all", "linalg_vector_norm", "norm"), reduce),
    **dict.fromkeys(("permute", "transpose", "t", "mT"), permute),
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    **dict.fromkeys(SIZED_VIEWS | {"flatten", "unflatten"}, view),
    **dict.fromkeys(("reshape_as", "view_as"), reshape_as),
    "expand": expand,
    "expand_as": elementwise,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(CONCATENATIONS, cat),
    "stack": stack,
    "select": select,
    "slice": slice_,
    **dict.fromkeys(PARTS, split),
    operator.getitem.__name__: getitem,
    "index": index,
    "embedding": embedding,
    "sym_size": size,
}


assert attention.__name__ in RULES


def knows(node: fx.Node) -> bool:
    """Whether a rule covers ``node``, even if it only says that ``node`` needs every position."""
    return op_name(node) in RULES or op_name(node) in EVERY_POSITION


def apply(node: fx.Node, labels: LabelMap) -> Outcome:
    """The outcome of ``node`` under ``labels``; raises :class:`AxisError` if no rule covers it."""
    if node.op != "call_function":
        raise AxisError(f"a {node.op} node")
    if op_name(node) in EVERY_POSITION:
        raise AxisError(f"{op_name(node)} needs every position{because(node)}")
    rule = RULES.get(op_name(node))
    if rule is None:
        raise AxisError(f"no rule for the operation {op_name(node)}{because(node)}")
    try:
        return rule(node, labels)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        # A form of the call that the rule was not written for: refuse it, whatever its arguments look like.
        raise AxisError(f"the rule of {op_name(node)} does not cover this form of it ({error})") from error
