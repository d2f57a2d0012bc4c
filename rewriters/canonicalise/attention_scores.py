"""Scores of attention: the operations between the product of queries and keys and the softmax.

Start at :func:`read_scores`. It walks from the softmax inwards and collects scale, soft cap and masks; what it cannot read
raises :class:`~rewriters.graph.match.NoMatch`, which says where and why.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx
from torch.fx.node import Argument

from madtp.tokens.attention import HIDDEN
from rewriters.canonicalise.attention_masks import Mask
from rewriters.graph.match import NoMatch, described, farthest, operation
from rewriters.graph.node_record import record
from rewriters.graph.nodes import example_shape, is_tensor, op_name, tensor_operands
from rewriters.graph.op_sets import ATTENTION, FILLS, KEEPS_VALUES, PRODUCTS, RESHAPES, SAME_VALUES
from rewriters.graph.walk import operand_chain, walk

# What the operation before the softmax may be; anything else is a miss that says so.
READABLE = "scores that meet a scale, a soft cap and masks (add, sub, masked_fill, where) alone before the softmax"

Steps = tuple[str, ...]


@dataclass
class Scores:
    """What was found between the product of queries and keys and the softmax.

    Attributes:
        product: the product of queries and keys.
        scale: the factor of the product.
        softcap: c of ``c * tanh(scale * product)``, to which the masks are added; None without a cap.
        masks: the masks, in the order in which they are applied.
        query_factors: factors, one for each head, that queries are multiplied by.
    """

    product: fx.Node
    scale: float = 1.0
    softcap: float | None = None
    masks: list[Mask] = field(default_factory=list)
    query_factors: list[fx.Node] = field(default_factory=list)


def read_scores(value: Argument, user: fx.Node, steps: Steps) -> Scores:
    """Read from the softmax inwards to the product of queries and keys.

    Args:
        value: the scores, as an argument of ``user``.
        user: what reads them.
        steps: what was recognised before.

    Raises:
        NoMatch: something on the way is not understood.
    """
    if not isinstance(value, fx.Node):
        raise NoMatch(user, "its scores are a constant", READABLE, steps)
    node, name = value, op_name(value)
    if node.op != "call_function" or not (is_tensor(node) or name == "getitem"):
        kind = "an input or parameter" if node.op in ("placeholder", "get_attr") else "a value that is not a tensor"
        raise NoMatch(node, f"its scores are {kind} ({node.name}), not a product of queries and keys", READABLE, steps)
    if name in PRODUCTS:
        return _product(node, steps)
    if name in SAME_VALUES or name in RESHAPES:
        return read_scores(node.args[0], node, steps)
    if name in ("mul", "div"):
        return _scaled(node, (*steps, "scale"))
    if name == "tanh":
        return _capped(node, (*steps, "soft cap"))
    if name == "add" and not node.kwargs:
        return _sum(node, (*steps, "mask"))
    if name == "sub" and not node.kwargs:
        return _difference(node, (*steps, "mask"))
    if name in FILLS:
        return _filled(node, (*steps, "mask"))
    passed = operation(node)
    if any(is_tensor(n) and has_scores(n) for n in passed.all_input_nodes):
        reason = f"its scores pass {described(passed)} on the way from the product to the softmax"
    else:
        reason = f"its scores come from {described(passed)}, not from a product of queries and keys"
    raise NoMatch(passed, reason, READABLE, steps)


def _product(node: fx.Node, steps: Steps) -> Scores:
    if op_name(node) != "baddbmm":
        return Scores(node)
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    mask = node.args[0]
    if beta not in (0, 1) or not isinstance(alpha, (int, float)) or not isinstance(mask, fx.Node):
        raise NoMatch(node, f"its mask is added {beta} times by {described(node)}", "a mask that is added once", steps)
    masks = [Mask("add", mask, example_shape(node))] if beta == 1 else []
    return Scores(node, scale=float(alpha), masks=masks)


def _capped(node: fx.Node, steps: Steps) -> Scores:
    inner = read_scores(node.args[0], node, steps)
    if inner.masks or inner.softcap is not None:
        reason = "its scores are capped (aten.tanh) behind a mask or another cap"
        raise NoMatch(node, reason, "a soft cap of the scaled product, and masks behind it", steps)
    return replace(inner, softcap=1.0)


def _scaled(node: fx.Node, steps: Steps) -> Scores:
    inner = read_scores(node.args[0], node, steps)
    operand = node.args[1]
    factor = constant_number(operand)
    if factor is None:
        shape = example_shape(operand) if is_tensor(operand) else ()
        of_heads = op_name(node) == "mul" and shape[-2:] == (1, 1)
        behind = inner.masks or inner.scale != 1.0 or inner.softcap is not None
        if not of_heads or behind or not isinstance(operand, fx.Node):
            verb = "multiplied" if op_name(node) == "mul" else "divided"
            what = f"{operand} {list(shape)}" if shape else str(operand)
            help = "a scale that is a number, or one factor for each head [H, 1, 1] right behind the product"
            raise NoMatch(node, f"its scores are {verb} by {what}", help, steps)
        inner.query_factors.append(operand)
        return inner
    factor = 1 / factor if op_name(node) == "div" else factor
    if inner.softcap is None:
        inner.scale *= factor
    elif factor == 0:
        raise NoMatch(node, "its capped scores are multiplied by 0", "a scale that is not 0", steps)
    else:
        inner.softcap *= factor
    inner.masks = [replace(m, times=m.times * factor) if m.kind == "add" else m for m in inner.masks]
    return inner


def _sum(node: fx.Node, steps: Steps) -> Scores:
    """A sum of scores and a mask, in either order."""
    misses = []
    for scores, mask in (node.args[:2], node.args[1::-1]):
        try:
            inner = read_scores(scores, node, steps)
        except NoMatch as error:
            misses.append((isinstance(scores, fx.Node) and has_scores(scores), error.miss))
            continue
        if isinstance(mask, fx.Node):
            inner.masks.append(Mask("add", mask, example_shape(node)))
        return inner
    # Of the scores themselves, if one operand is a product of queries and keys.
    are_scores = max(of_scores for of_scores, _ in misses)
    miss = farthest(miss for of_scores, miss in misses if of_scores == are_scores)
    raise NoMatch(miss.node, miss.reason, miss.help, miss.steps)


def _difference(node: fx.Node, steps: Steps) -> Scores:
    mask = node.args[1]
    inner = read_scores(node.args[0], node, steps)
    if isinstance(mask, fx.Node) and not _is_shift(mask, node):
        inner.masks.append(Mask("add", mask, example_shape(node), times=-1.0))
    return inner


def _is_shift(value: fx.Node, scores: fx.Node) -> bool:
    """Whether ``value`` is one number for all keys of a query, which does not change a softmax."""
    shape = example_shape(value) if is_tensor(value) else ()
    return (not shape or shape[-1] == 1) and example_shape(scores)[-1] > 1


def _filled(node: fx.Node, steps: Steps) -> Scores:
    """Scores some of which a mask hides, by a number in their place."""
    hidden = constant_number(node.args[2])
    if hidden is None or hidden > HIDDEN:
        by = f"the value {node.args[2]}" if hidden is None else f"{hidden:g}"
        reason = f"its scores are filled with {by} where a mask says so, which hides no key"
        raise NoMatch(node, reason, "a mask that fills with -inf or the lowest number of the type", steps)
    fills = op_name(node) == "masked_fill"
    scores, mask = node.args[:2] if fills else node.args[1::-1]
    if not isinstance(mask, fx.Node):
        raise NoMatch(node, "its scores are filled by a constant mask", READABLE, steps)
    inner = read_scores(scores, node, steps)
    inner.masks.append(Mask("hide" if fills else "show", mask, example_shape(node), hidden=hidden))
    return inner


def constant_number(value: Argument) -> float | None:
    """A Python number, or the value of a scalar constant of the graph; None for anything else."""
    if isinstance(value, (int, float)):
        return float(value)
    for node in operand_chain(value, _repeats_number):
        number: Argument = None
        if node.op == "get_attr":
            number = record(node).number
        elif op_name(node) == "scalar_tensor":
            number = node.args[0]
        elif op_name(node) == "full":
            number = node.args[1]
        if isinstance(number, (int, float)):
            return float(number)
    return None


def _repeats_number(node: fx.Node) -> bool:
    passed = op_name(node) in KEEPS_VALUES or op_name(node) in ("lift_fresh_copy", "expand")
    return node.op == "call_function" and passed


def is_score_step(node: fx.Node) -> bool:
    """Whether ``node`` may be a step on the way from the product of queries and keys to a map."""
    if not is_tensor(node) or node.op != "call_function":
        return False
    return op_name(node) not in PRODUCTS | ATTENTION | {"linear", "embedding"}


def has_scores(node: fx.Node) -> bool:
    """Whether a product of queries and keys is among what ``node`` is computed from, with as many keys."""
    found = walk([node], lambda n: score_operands(n) if is_score_step(n) else ())
    return any(n.op == "call_function" and op_name(n) in PRODUCTS for n in found)


def is_like_map(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether ``node`` may be a map of ``shape`` [..., Q, K] in another order of dimensions, with other heads."""
    own = list(example_shape(node))
    for size in shape[-2:]:
        if size not in own:
            return False
        own.remove(size)
    return True


def score_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of a step that may be scores: as many queries and keys, in any order of dimensions."""
    return [n for n in tensor_operands(operation(node)) if is_like_map(n, example_shape(node))]
