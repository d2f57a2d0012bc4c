"""Rules of attention maps that keep their own spelling (``canonicalise/attention_maps.py``); see ``table.py`` for the table.

Operations that mix values along the keys receive the state of the keys' tokens, so that pruned ones do not count.
"""

from __future__ import annotations

from torch import fx

from rewriters.axes.labels import Axis, Dim, LabelMap, Labels, has_tokens, is_plain, plain, token_axis
from rewriters.axes.outcome import Outcome, require_plain
from rewriters.graph.nodes import AxisError


def shares(node: fx.Node, labels: LabelMap) -> Outcome:
    """A softmax over the keys, the last dimension."""
    own = labels.of(node.args[0])
    return Outcome(labels=own, states=_keys(own))


def total(node: fx.Node, labels: LabelMap) -> Outcome:
    """A sum over the keys, the last dimension."""
    own = labels.of(node.args[0])
    kept = (plain(1),) if len(node.args) > 1 and node.args[1] else ()
    return Outcome(labels=Labels((*own[:-1], *kept)), states=_keys(own))


def weigh(node: fx.Node, labels: LabelMap) -> Outcome:
    """``[B, H, Q, K] @ [B, H, K, D]``: the result runs along the queries; weights and values run along the same keys."""
    weights, values = (labels.of(node.args[i]) for i in (0, 1))
    require_plain((weights[1], values[1]), node)
    if has_tokens(weights[3]) != has_tokens(values[2]) or token_axis(weights[3]) != token_axis(values[2]):
        raise AxisError("weights and values run along different tokens")
    batch: Dim = weights[0] if not is_plain(weights[0]) else values[0]
    return Outcome(labels=Labels((batch, weights[1], weights[2], values[3])), states=_keys(weights))


def _keys(own: Labels) -> dict[str, Axis]:
    """The state of the keys, by the name under which the operation takes it."""
    axis = token_axis(own[-1])
    if axis is None:
        return {}
    if own.batch_and_heads()[0] != 0:
        raise AxisError("an attention map whose first dimension is not the batch")
    return {"state": axis}
