"""Where a stream comes from: its modality, and the learned tokens (class token, registers) among its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriters.axes.labels import Axis, Factor, has_tokens, unlabelled
from rewriters.axes.propagate import propagate
from rewriters.graph.node_record import record
from rewriters.graph.nodes import example_shape, is_tensor, normal_dim, op_name
from rewriters.graph.origins import is_learned, value_ancestors

# Layers with learned weights, and where their channels come out; what may lie between one and weights of tokens.
CHANNELS = {"linear": -1, "conv1d": 1, "conv2d": 1}
ON_THE_WAY = frozenset(
    "view reshape flatten unflatten transpose permute squeeze unsqueeze to _to_copy contiguous clone mul div add softmax "
    "shares dropout".split()
)
CONVOLUTIONS = frozenset("conv1d conv2d conv3d convolution unfold im2col".split())


def stream_modality(head: fx.Node) -> str:
    """ "text" if the stream descends from token ids, "image" if from pixels or features, "joint" if from both, else
    "query"."""
    ancestors = list(value_ancestors(head))
    inputs = [n for n in ancestors if n.op == "placeholder" and n.meta["val"].dtype.is_floating_point]
    # What goes into a region was followed through a run; what goes into a whole model is pixels or features.
    carried = frozenset().union(*(_modalities_of(n) for n in inputs))
    text = any(op_name(n) == "embedding" and _reads_ids(n) for n in ancestors if n.op == "call_function")
    text = text or "text" in carried
    image = "image" in carried
    image = image or any(n.op == "call_function" and op_name(n) in CONVOLUTIONS for n in ancestors)
    if text and image:
        return "joint"
    return "text" if text else "image" if image else "query"


def _modalities_of(given: fx.Node) -> frozenset[str]:
    followed = record(given).modalities
    return frozenset({"image"}) if followed is None else followed


def _reads_ids(embedding: fx.Node) -> bool:
    index = embedding.args[1]
    if not isinstance(index, fx.Node):
        return False
    inputs = [n for n in value_ancestors(index) if n.op == "placeholder"]
    return any(not n.meta["val"].dtype.is_floating_point and n.meta["val"].dtype != torch.bool for n in inputs)


def pools(attention: fx.Node) -> bool:
    """Whether attention condenses tokens: into one, or into latents, which descend from parameters but for what attention
    read into them."""
    if example_shape(attention.args[0])[2] == 1:  # type: ignore[arg-type]
        return True
    stack, seen = [attention], {attention}
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return False
        operands = node.args[:1] if op_name(node) == "attention" else node.all_input_nodes
        for operand in operands:
            if isinstance(operand, fx.Node) and operand not in seen and op_name(operand) != "sym_size":
                seen.add(operand)
                stack.append(operand)
    return True


def weighs_by_layer(weights: fx.Node) -> bool:
    """Whether weights of tokens have a row for each channel of a learned layer on them: what they weigh is condensed."""
    shape = example_shape(weights)
    if len(shape) < 3 or shape[-2] == shape[-1]:
        return False
    path: list[fx.Node] = []
    layer: Any = weights
    while is_tensor(layer) and op_name(layer) in ON_THE_WAY:
        path.append(layer)
        layer = layer.args[0]
    if not is_tensor(layer) or op_name(layer) not in CHANNELS:
        return False
    if not all(is_learned(n) for n in layer.args[1:3] if is_tensor(n)):
        return False
    shape = example_shape(layer)
    channels = normal_dim(CHANNELS[op_name(layer)], len(shape))
    labels = unlabelled(shape).with_dim(channels, (Factor(Axis("tokens", "channels"), shape[channels]),))
    rows = propagate(reversed(path), {layer: labels}).labels.tensor(weights)
    return rows is not None and [has_tokens(dim) for dim in rows[-2:]] == [True, False]


def special_positions(head: fx.Node, token_dim: int) -> tuple[int, ...]:
    """Positions of learned tokens that were concatenated in front of the stream's tokens."""
    shape = example_shape(head)
    node = head
    while node.op == "call_function":
        if op_name(node) in ("cat", "concat"):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if normal_dim(dim, len(example_shape(node))) == token_dim:  # type: ignore[arg-type]
                return _learned_prefix(list(node.args[0]), token_dim)  # type: ignore[arg-type]
        same = [
            n
            for n in node.all_input_nodes
            if is_tensor(n) and sorted(example_shape(n)) == sorted(shape) and not is_learned(n)
        ]
        if op_name(node) in ("transpose", "permute") and len(shape) == 3 and same:
            before = example_shape(same[0])
            token_dim = next((d for d in (0, 1) if before[d] == shape[token_dim]), token_dim)
            shape = before
        if not same:
            break
        node = same[0]
    return ()


def _learned_prefix(operands: list[fx.Node], token_dim: int) -> tuple[int, ...]:
    count = 0
    for operand in operands:
        if not is_learned(operand):
            inner = special_positions(operand, token_dim)
            return (*range(count), *(count + p for p in inner))
        count += example_shape(operand)[token_dim]
    return tuple(range(count))
