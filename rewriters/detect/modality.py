"""Where a stream comes from: its modality, and the learned tokens (class token, registers) among its tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from rewriters.axes.labels import Axis, Factor, has_tokens, unlabelled
from rewriters.axes.propagate import propagate
from rewriters.graph.dependencies import is_learned, value_ancestors
from rewriters.graph.node_record import record
from rewriters.graph.nodes import (
    call_argument,
    example_shape,
    int_argument,
    is_tensor,
    normal_dim,
    op_name,
    operand,
    tensor_operands,
)
from rewriters.graph.op_sets import CONCATENATIONS, CONVOLUTIONS, KEEPS_VALUES, PERMUTATIONS, SCALINGS, SOFTMAXES, VIEWS
from rewriters.graph.walk import behind, is_not_size, operand_chain, walk

# Layers with learned weights, and where their channels come out; what may lie between one and weights of tokens.
CHANNELS = {"linear": -1, "conv1d": 1, "conv2d": 1}
_TO_WEIGHTS = VIEWS | PERMUTATIONS | KEEPS_VALUES | SCALINGS | SOFTMAXES | {"add", "shares"}
_IDS = frozenset((torch.int32, torch.int64))
# How pixels become patches.
_PATCHES = CONVOLUTIONS | {"convolution", "unfold", "im2col"}


def stream_modality(head: fx.Node) -> str:
    """ "text" if the stream descends from token ids, "image" if from pixels or features, "joint" if from both, else
    "query"."""
    origins = list(value_ancestors(head))
    inputs = [n for n in origins if n.op == "placeholder"]
    # What goes into a region was followed through a run; what goes into a whole model is pixels or features.
    carried = frozenset().union(*(_modalities_of(n) for n in inputs if n.meta["val"].dtype.is_floating_point))
    calls = [n for n in origins if n.op == "call_function"]
    text = "text" in carried or any(_looks_words_up(n) for n in calls)
    image = "image" in carried or any(op_name(n) in _PATCHES and not _mixes_words(n) for n in calls)
    if text and image:
        return "joint"
    if text or image:
        return "text" if text else "image"
    # Words may be looked up by indexing, or by a product with a row of zeros and a one.
    dtypes = {n.meta["val"].dtype for n in inputs}
    return "text" if dtypes & _IDS else "image" if torch.uint8 in dtypes else "query"


def _looks_words_up(node: fx.Node) -> bool:
    return op_name(node) == "embedding" and _reads_ids(node)


def _mixes_words(convolution: fx.Node) -> bool:
    """Whether a convolution runs over words, not over pixels."""
    origins = list(value_ancestors(convolution))
    if any(n.op == "placeholder" and n.meta["val"].dtype.is_floating_point for n in origins):
        return False
    return any(n.op == "call_function" and _looks_words_up(n) for n in origins)


def _modalities_of(value: fx.Node) -> frozenset[str]:
    known = record(value).modalities
    return frozenset(("image",)) if known is None else known


def _reads_ids(embedding: fx.Node) -> bool:
    index = embedding.args[1]
    if not isinstance(index, fx.Node):
        return False
    types = [n.meta["val"].dtype for n in value_ancestors(index) if n.op == "placeholder"]
    return any(not dtype.is_floating_point and dtype != torch.bool for dtype in types)


def is_pooling(attention: fx.Node) -> bool:
    """Whether attention condenses tokens into one, or into latents.

    Latents descend from parameters, except for what attention added to them.
    """
    if example_shape(operand(attention))[2] == 1:
        return True

    def onward(node: fx.Node) -> Iterable[fx.Node]:
        operands = node.args[:1] if op_name(node) == "attention" else node.all_input_nodes
        return [n for n in operands if isinstance(n, fx.Node) and is_not_size(n)]

    return not any(node.op == "placeholder" for node in walk([attention], onward))


def is_pooled_by_layer(weights: fx.Node) -> bool:
    """Whether a learned layer gives the weights of tokens a row for each of its channels, so that the result is condensed."""
    shape = example_shape(weights)
    if len(shape) < 3 or shape[-2] == shape[-1]:
        return False
    layer = behind(weights, _TO_WEIGHTS)
    if not is_tensor(layer) or op_name(layer) not in CHANNELS:
        return False
    if not all(is_learned(n) for n in layer.args[1:3] if is_tensor(n)):
        return False
    path = [n for n in operand_chain(weights, lambda n: n is not layer) if n is not layer]
    shape = example_shape(layer)
    channels = normal_dim(CHANNELS[op_name(layer)], len(shape))
    labels = unlabelled(shape).with_dim(channels, (Factor(Axis("tokens", "channels"), shape[channels]),))
    rows = propagate(reversed(path), {layer: labels}).labels.of(weights)
    return [has_tokens(dim) for dim in rows[-2:]] == [True, False]


def special_positions(head: fx.Node, token_dim: int) -> tuple[int, ...]:
    """Positions of learned tokens that were concatenated in front of the stream's tokens."""
    shape = example_shape(head)
    node = head
    while node.op == "call_function":
        if op_name(node) in CONCATENATIONS:
            dim = int_argument(node, 1, "dim", 0)
            if normal_dim(dim, len(example_shape(node))) == token_dim:
                return _learned_prefix(call_argument(node, 0, "tensors", ()), token_dim)
        same = [n for n in tensor_operands(node) if sorted(example_shape(n)) == sorted(shape) and not is_learned(n)]
        if not same:
            break
        if op_name(node) in PERMUTATIONS and len(shape) == 3:
            before = example_shape(same[0])
            token_dim = next((d for d in (0, 1) if before[d] == shape[token_dim]), token_dim)
            shape = before
        node = same[0]
    return ()


def _learned_prefix(operands: list[fx.Node], token_dim: int) -> tuple[int, ...]:
    count = 0
    for part in operands:
        if not is_learned(part):
            inner = special_positions(part, token_dim)
            return (*range(count), *(count + p for p in inner))
        count += example_shape(part)[token_dim]
    return tuple(range(count))
