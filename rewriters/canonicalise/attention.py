"""Spellings of attention: scaled_dot_product_attention, and product, scale, mask, softmax, product in their variants.

Start at :func:`canonical_attention`. Each softmax is read outwards to the product with the values, and inwards to the product
of queries and keys (``attention_scores.py``); scale factors and masks met on the way become operands of one attention node. A
softmax that does not fit is left as it is and remembers why (``graph/match.py``), so a near miss costs a site, never
correctness.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from madtp.tokens.attention import attention
from rewriters.canonicalise.attention_heads import fold_heads, folded_heads, unfold_heads
from rewriters.canonicalise.attention_masks import Mask, fold_mask, join, unfold_mask
from rewriters.canonicalise.attention_scores import Scores, Steps, has_scores, is_like_map, read_scores
from rewriters.canonicalise.attention_windows import WindowLayout, window_layout
from rewriters.graph.emit import emit
from rewriters.graph.match import NoMatch, attempt, described
from rewriters.graph.nodes import (
    AxisError,
    call_argument,
    example_shape,
    is_tensor,
    normal_dim,
    op_name,
    tensor_operands,
)
from rewriters.graph.op_sets import KEEPS_VALUES, PRODUCTS, RESHAPES, SAME_VALUES, SOFTMAXES
from rewriters.graph.walk import descendants, has_values

aten = torch.ops.aten
SDPA = "scaled_dot_product_attention"
# What would help where no step of the spelling says anything better.
PLAIN_SPELLING = "scaled_dot_product_attention, or a product, scale, mask, softmax and product over heads [B, H, N, D]"
ONE_PRODUCT = "probabilities that one product with the values reads, and otherwise at most the model's output"


def canonical_attention(graph: fx.Graph) -> None:
    """Replace every recognised spelling in place."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if op_name(node) == SDPA:
            with attempt(node, PLAIN_SPELLING, (SDPA,)):
                _from_sdpa(graph, node)
        elif op_name(node) in SOFTMAXES:
            with attempt(node, PLAIN_SPELLING, ("softmax",)):
                _from_softmax(graph, node)


@dataclass(frozen=True)
class _HeadLayout:
    """How operands and results of attention become ``[B, H, N, D]`` and back.

    Attributes:
        rank: dimensions of queries, keys and values.
        heads: the number of heads folded into operands of rank 3, ``[B * H, N, D]``.
        windows: the layout of windows in operands of rank 5.
    """

    rank: int
    heads: int = 1
    windows: WindowLayout | None = None

    def fold(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """An operand as ``[B, H, N, D]``."""
        if self.windows is not None:
            return self.windows.fold(graph, node)
        return unfold_heads(graph, node, self.heads) if self.rank == 3 else node

    def unfold(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """The result ``[B, H, N, D]`` in the layout of the operands."""
        if self.windows is not None:
            return self.windows.unfold(graph, node)
        return fold_heads(graph, node) if self.rank == 3 else node


def _head_layout(operands: list[fx.Node], rank: int) -> _HeadLayout:
    """The layout of queries, keys and values whose product has ``rank`` dimensions; raises :class:`AxisError` if there is
    none."""
    if rank == 3:
        return _HeadLayout(rank, heads=folded_heads(operands[0]))
    if rank == 4:
        return _HeadLayout(rank)
    if rank == 5:
        return _HeadLayout(rank, windows=window_layout(operands))
    raise AxisError(f"its result has {rank} dimensions, where 3, 4 or 5 are known")


def _from_sdpa(graph: fx.Graph, node: fx.Node) -> None:
    mask: Any = call_argument(node, 3, "attn_mask", None)
    with graph.inserting_before(node):
        operands = [call_argument(node, n, name, None) for n, name in enumerate(("query", "key", "value"))]
        layout = _head_layout(operands, len(example_shape(node)))
        if layout.windows is not None and mask is not None:
            mask = layout.windows.fold_mask(graph, mask, operands[0])
        if layout.rank == 3 and mask is not None:
            mask = unfold_mask(graph, mask, layout.heads, node, layout.rank)
        dropout = call_argument(node, 4, "dropout_p", 0.0)
        causal = call_argument(node, 5, "is_causal", False)
        query, key, value = (layout.fold(graph, n) for n in operands)
        grouped = call_argument(node, 7, "enable_gqa", False)
        if not grouped:
            key, value, grouped = _keys_for_heads(graph, query, key, value)
        new = emit(
            graph,
            attention,
            (query, key, value, mask, dropout, causal),
            node,
            scale=call_argument(node, 6, "scale", None),
            grouped=grouped,
        )
        result = layout.unfold(graph, new)
    result.meta |= {k: v for k, v in node.meta.items() if k != "val"}
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _from_softmax(graph: fx.Graph, softmax: fx.Node) -> None:
    keys = example_shape(softmax)[-1:]
    dim = call_argument(softmax, 1, "dim", None)
    if not isinstance(dim, int) or normal_dim(dim, len(example_shape(softmax))) != len(example_shape(softmax)) - 1:
        reason = (
            f"its softmax runs over dimension {dim} of scores {list(example_shape(softmax))}, not over the last one"
        )
        raise NoMatch(softmax, reason, "a softmax over the keys, which stand last", ("softmax",))
    weighed = _read_outwards(softmax)
    product, steps = weighed.product, weighed.steps
    scores = read_scores(softmax.args[0], softmax, steps)
    query, key, value = (_factor(n, at, steps) for n, at in ((scores.product, -2), (scores.product, -1), (product, 1)))
    rank = len(example_shape(product))
    shapes = [example_shape(n) for n in (query, key, value)]
    sizes = f"queries {list(shapes[0])}, keys {list(shapes[1])} and values {list(shapes[2])}"
    if rank not in (3, 4, 5) or any(len(s) != rank for s in shapes):
        raise NoMatch(product, f"its products differ in rank: {sizes}", PLAIN_SPELLING, steps)
    of_masks = [m.scores[-1:] for m in scores.masks]
    if any(n != keys for n in (shapes[1][-1:], shapes[2][-2:-1], *of_masks)):
        reason = f"its softmax is over {keys[0]} scores, which are not one for each key: {sizes}"
        raise NoMatch(softmax, reason, PLAIN_SPELLING, steps)
    try:
        result = _emit_attention(graph, scores, (query, key, value), weighed)
    except AxisError as error:
        raise NoMatch(product, str(error), PLAIN_SPELLING, steps) from error
    product.replace_all_uses_with(result)


def _factor(product: fx.Node, at: int, steps: Steps) -> fx.Node:
    """A factor of a product."""
    found = product.args[at]
    if not is_tensor(found):
        raise NoMatch(product, f"a factor of {product.name} is not a tensor", PLAIN_SPELLING, steps)
    return found


@dataclass(frozen=True)
class _Weighed:
    """The product of probabilities and values, the dropout on the way, and the steps that led there."""

    product: fx.Node
    dropout: float
    steps: Steps


def _emit_attention(
    graph: fx.Graph, scores: Scores, operands: tuple[fx.Node, fx.Node, fx.Node], weighed: _Weighed
) -> fx.Node:
    """Attention in place of a product with the values; keys are ``[..., D, K]`` here."""
    query, key, value = operands
    product = weighed.product
    with graph.inserting_before(product):
        key = emit(graph, aten.transpose.int, (key, -1, -2), product)
        for factor in scores.query_factors:
            query = emit(graph, aten.mul.Tensor, (query, factor), product)
        layout = _head_layout([query, key, value], len(example_shape(product)))
        unfolded = query
        query, key, value = (layout.fold(graph, n) for n in (query, key, value))
        key, value, grouped = _keys_for_heads(graph, query, key, value)
        masks = [
            replace(
                m,
                node=_folded_mask(graph, m, layout, query, product)
                if layout.windows is None
                else layout.windows.fold_mask(graph, m.node, unfolded),
            )
            for m in scores.masks
        ]
        mask = join(graph, masks, product, query.meta["val"].dtype)
        cap: dict[str, float] = {} if scores.softcap is None else {"softcap": scores.softcap}
        scale = scores.scale * cap.get("softcap", 1.0)
        arguments = (query, key, value, mask, weighed.dropout, False)
        new = emit(graph, attention, arguments, product, scale=scale, grouped=grouped, **cap)
        result = layout.unfold(graph, new)
        wanted = product.meta["val"].dtype
        return result if result.meta["val"].dtype == wanted else emit(graph, aten.to.dtype, (result, wanted), product)


class _KeysForHeads(NamedTuple):
    """Keys and values, and whether they have one head for several of the queries."""

    key: fx.Node
    value: fx.Node
    grouped: bool


def _keys_for_heads(graph: fx.Graph, query: fx.Node, key: fx.Node, value: fx.Node) -> _KeysForHeads:
    """Keys and values ``[B, H, K, D]``, either of which may have one head for all heads of the queries."""
    wanted = example_shape(query)[1]
    few = [wanted > 1 and example_shape(n)[1] == 1 for n in (key, value)]
    if any(few) and not all(few):
        sizes = [-1, wanted, -1, -1]
        key, value = (
            emit(graph, aten.expand.default, (n, sizes), n) if one else n
            for n, one in zip((key, value), few, strict=True)
        )
    return _KeysForHeads(key, value, grouped=all(few))


def _folded_mask(graph: fx.Graph, mask: Mask, layout: _HeadLayout, query: fx.Node, product: fx.Node) -> fx.Node:
    """A mask for scores ``[B, H, Q, K]``."""
    if layout.rank == 3:
        return unfold_mask(graph, mask.node, layout.heads, product, mask.rank)
    return fold_mask(graph, mask, query, product)


def is_unrecognised(node: fx.Node) -> bool:
    """Whether ``node`` is attention in a spelling that is not known: a softmax whose probabilities weigh something, or a
    scaled_dot_product_attention that does not fit."""
    if op_name(node) == SDPA and node.op == "call_function":
        return True
    if op_name(node) not in SOFTMAXES:
        return False
    reached = descendants(node, through=lambda n: n is node or _keeps_probabilities(n))
    return any(op_name(n) in PRODUCTS or op_name(n) == "einsum" for n in reached if n is not node)


def weighs_indirectly(node: fx.Node) -> bool:
    """Whether ``node`` is a softmax of scores whose probabilities weigh something after operations that are not understood."""
    if op_name(node) not in SOFTMAXES or not any(map(has_scores, tensor_operands(node))):
        return False
    shape = example_shape(node)

    def may_hold_probabilities(user: fx.Node) -> bool:
        if op_name(user) in PRODUCTS or not is_tensor(user):
            return has_values(user)
        return is_like_map(user, shape)

    reached = descendants(node, through=lambda n: op_name(n) not in PRODUCTS, among=may_hold_probabilities)
    return any(op_name(n) in PRODUCTS for n in reached)


def _keeps_probabilities(node: fx.Node) -> bool:
    name = op_name(node)
    return name == "dropout" or name in KEEPS_VALUES or name in RESHAPES


def _read_outwards(softmax: fx.Node) -> _Weighed:
    """Read from the softmax outwards to the product of probabilities and values."""
    node, dropout = softmax, 0.0
    steps: Steps = ("softmax",)
    while True:
        users = [u for u in node.users if not _is_only_returned(u)]
        if len(users) != 1:
            raise _not_one_user(node, users, steps)
        user = users[0]
        name = op_name(user)
        if name in PRODUCTS and user.args[0] is node and name != "baddbmm":
            return _Weighed(user, dropout, (*steps, "product with the values"))
        if name == "dropout" and isinstance(user.args[1], float):
            dropout = user.args[1] if user.args[2] else 0.0
            steps = (*steps, "dropout")
        elif name in PRODUCTS:
            raise NoMatch(user, f"its probabilities are the second factor of {described(user)}", ONE_PRODUCT, steps)
        elif name not in SAME_VALUES and name not in RESHAPES and name != "expand":
            reason = (
                f"its probabilities pass {described(user)} on the way from the softmax to the product with the values"
            )
            raise NoMatch(user, reason, ONE_PRODUCT, steps)
        node = user


def _not_one_user(node: fx.Node, users: list[fx.Node], steps: Steps) -> NoMatch:
    if not users:
        return NoMatch(node, "nothing but the model's output reads its probabilities", ONE_PRODUCT, steps)
    # The product is as it should be; what else reads the probabilities is not.
    obstacle = next((u for u in users if op_name(u) not in PRODUCTS), users[-1])
    names = ", ".join(described(u) for u in users)
    return NoMatch(obstacle, f"its probabilities are read by {len(users)} operations ({names})", ONE_PRODUCT, steps)


def _is_only_returned(node: fx.Node) -> bool:
    """Whether ``node`` serves the outputs of the graph alone: attention maps that a model hands out."""
    if node.op == "output":
        return True
    return _keeps_probabilities(node) and bool(node.users) and all(map(_is_only_returned, node.users))
