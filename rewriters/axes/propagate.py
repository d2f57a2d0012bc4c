"""Carry axis labels forward from seeds, without changing the graph.

Start at :func:`propagate`. ``detect/streams.py`` uses it to learn where a stream goes and where it is read out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from rewriters.axes.labels import Labels, any_tokens
from rewriters.axes.outcome import LabelMap, Readout
from rewriters.axes.table import apply
from rewriters.graph.nodes import AxisError


@dataclass
class Flow:
    """Where seeded axes went.

    Attributes:
        labels: of every node that runs along a seeded axis.
        readouts: places where the token axis ends, by node.
        blocked: nodes that no rule covers, with the reason.
    """

    labels: dict[fx.Node, Labels | tuple[Labels, ...]] = field(default_factory=dict)
    readouts: dict[fx.Node, Readout] = field(default_factory=dict)
    blocked: dict[fx.Node, str] = field(default_factory=dict)


def runs_along(node: fx.Node, labels: LabelMap) -> bool:
    """Whether any operand of ``node`` runs along a token axis."""
    for operand in node.all_input_nodes:
        known = labels.get(operand)
        if known is None:
            continue
        if known and isinstance(known[0], tuple) and known[0] and isinstance(known[0][0], tuple) and _several(known):
            if any(any_tokens(one) for one in known):  # type: ignore[arg-type]
                return True
        elif any_tokens(known):  # type: ignore[arg-type]
            return True
    return False


def _several(labels: Labels | tuple[Labels, ...]) -> bool:
    """Whether ``labels`` are those of several results."""
    first = labels[0]
    return bool(first) and not hasattr(first[0], "axis")


def propagate(nodes: Iterable[fx.Node], seeds: Mapping[fx.Node, Labels], *, beyond_joins: bool = True) -> Flow:
    """Run the rule table over ``nodes`` (in graph order) from the labels in ``seeds``; ``beyond_joins``: also where the
    tokens are concatenated with others."""
    flow = Flow(labels=dict(seeds))
    for node in nodes:
        if node in flow.labels or node.op == "output" or not runs_along(node, flow.labels):
            continue
        try:
            outcome = apply(node, flow.labels)
        except AxisError as error:
            flow.blocked[node] = str(error)
            continue
        if outcome.readout is not None:
            flow.readouts[node] = outcome.readout
            if outcome.readout.kind == "join" and not beyond_joins:
                continue
        if outcome.results is not None:
            flow.labels[node] = outcome.results
        elif outcome.labels is not None and any_tokens(outcome.labels):
            flow.labels[node] = outcome.labels
    return flow
