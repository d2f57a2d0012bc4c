"""Rules of operations that mix channels under a spelling of their own; see ``table.py`` for the table."""

from __future__ import annotations

from torch import fx

from rewriters.axes.arguments import dim_argument, operand_list
from rewriters.axes.labels import Dim, LabelMap, Labels, ResultLabels, axes_of, has_tokens, is_plain, plain
from rewriters.axes.outcome import Outcome, require_plain, require_unlabelled, same_axes
from rewriters.graph.nodes import AxisError, call_argument, example_shape, int_argument, operand


def einsum(node: fx.Node, labels: LabelMap) -> Outcome:
    """``"bnc,cd->bnd"``: a letter that is summed runs along no axis, one that stays means the same in all operands."""
    equation, operands = node.args[0], operand_list(node, 1)
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise AxisError(f"an einsum of the form {equation!r}")
    inputs, output = equation.replace(" ", "").split("->")
    meaning: dict[str, Dim] = {}
    for letters, factor in zip(inputs.split(","), operands, strict=True):
        if len(set(letters)) != len(letters):
            raise AxisError(f"an einsum that reads a diagonal ({equation!r})")
        for letter, dim in zip(letters, labels.of(factor), strict=True):
            known = meaning.get(letter)
            if known is None or (is_plain(known) and not has_tokens(dim)):
                meaning[letter] = dim
            elif not same_axes(known, dim) and (has_tokens(known) or has_tokens(dim)):
                raise AxisError(f"the letter {letter} of {equation!r} runs along tokens in one operand only")
    require_plain((dim for letter, dim in meaning.items() if letter not in output), node)
    return Outcome(labels=Labels(meaning[letter] for letter in output))


def conv1d(node: fx.Node, labels: LabelMap) -> Outcome:
    """``[B, C, N] -> [B, C', N]`` where the kernel is one token wide; wider ones need every position."""
    own = labels.of(node.args[0])
    weight = operand(node, 1)
    require_unlabelled(node.args[1:3], labels, node)
    stride, padding = (_number(call_argument(node, i, n, d)) for i, n, d in ((3, "stride", 1), (4, "padding", 0)))
    if example_shape(weight)[-1] != 1 or stride != 1 or padding != 0:
        raise AxisError("conv1d needs every position: its kernel is wider than one token")
    require_plain(own[-2:-1], node)
    return Outcome(labels=own.with_dim(len(own) - 2, plain(example_shape(node)[-2])))


def conv2d(node: fx.Node, labels: LabelMap) -> Outcome:
    """``[B, C, Q, K] -> [B, C', Q, K]`` where the kernel is one element wide; wider ones need every position.

    Heads of an attention map are mixed so.
    """
    own = labels.of(node.args[0])
    require_unlabelled(node.args[1:3], labels, node)
    if len(own) != 4 or not is_pointwise_conv2d(node):
        raise AxisError("conv2d needs every position: its kernel is wider than one of them, or it strides or pads")
    require_plain(own[1:2], node)
    return Outcome(labels=own.with_dim(1, plain(example_shape(node)[1])))


def is_pointwise_conv2d(node: fx.Node) -> bool:
    """Whether a two-dimensional convolution computes each position from that position alone."""
    weight = operand(node, 1)
    stride, padding = (call_argument(node, i, n, d) for i, n, d in ((3, "stride", 1), (4, "padding", 0)))
    if example_shape(weight)[-2:] != (1, 1) or stride not in (1, [1], [1, 1]):
        return False
    return padding in (0, [0], [0, 0], "valid", "same")


def _number(value: object) -> object:
    """The entry of a list of one."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def batch_norm(node: fx.Node, labels: LabelMap) -> Outcome:
    """Channels are dimension 1; with running statistics, elements do not mix."""
    own = labels.of(node.args[0])
    require_unlabelled(node.args[1:5], labels, node)
    if call_argument(node, 5, "training", False):
        raise AxisError("batch_norm in training mixes tokens and samples")
    require_plain(own[1:2], node)
    return Outcome(labels=own)


def view_as_complex(node: fx.Node, labels: LabelMap) -> Outcome:
    """Removes the last dimension, of size 2."""
    own = labels.of(node.args[0])
    require_plain(own[-1:], node)
    return Outcome(labels=Labels(own[:-1]))


def view_as_real(node: fx.Node, labels: LabelMap) -> Outcome:
    """Adds a last dimension, of size 2."""
    return Outcome(labels=Labels((*labels.of(node.args[0]), plain(2))))


def index_select(node: fx.Node, labels: LabelMap) -> Outcome:
    """Entries of a dimension that runs along no axis."""
    own = labels.of(node.args[0])
    dim = dim_argument(node, 1, len(own))
    require_unlabelled(node.args[2:3], labels, node)
    if not is_plain(own[dim]):
        raise AxisError(f"index_select along {axes_of(own[dim])}")
    return Outcome(labels=own.with_dim(dim, plain(example_shape(node)[dim])))


def topk(node: fx.Node, labels: LabelMap) -> Outcome:
    """Values and indices of the largest entries of a dimension that runs along no axis."""
    own = labels.of(node.args[0])
    dim = dim_argument(node, 2, len(own), default=-1)
    require_plain(own[dim : dim + 1], node)
    largest = own.with_dim(dim, plain(int_argument(node, 1, "k")))
    return Outcome(labels=ResultLabels((largest, largest)))


def one_hot(node: fx.Node, labels: LabelMap) -> Outcome:
    """Adds a last dimension, of classes."""
    return Outcome(labels=Labels((*labels.of(node.args[0]), plain(example_shape(node)[-1]))))


def scatter(node: fx.Node, labels: LabelMap) -> Outcome:
    """Entries written to positions of a dimension that runs along no axis, for the same tokens in all operands."""
    own = labels.of(node.args[0])
    dim = dim_argument(node, 1, len(own))
    for value in node.args[2:4]:
        if not isinstance(value, fx.Node):
            continue
        other = labels.of(value)
        require_plain((own[dim], other[dim]), node)
        if not all(same_axes(a, b) for d, (a, b) in enumerate(zip(own, other, strict=True)) if d != dim):
            raise AxisError("scatter of values that run along other tokens than what they are written to")
    return Outcome(labels=own)
