"""Carry axis labels forward from seeds, without changing the graph.

Start at :func:`propagate`. ``detect/streams.py`` uses it to learn where a stream goes and where it is read out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from rewriters.axes.labels import LabelMap, Labels, ResultLabels
from rewriters.axes.readouts import ConcatenationReadout, Readout
from rewriters.axes.table import apply
from rewriters.graph.nodes import AxisError


@dataclass
class Flow:
    """Where seeded axes go.

    Attributes:
        labels: Labels of every node that runs along a seeded axis.
        readouts: What reads the token axis, by node.
        blocked: Nodes that no rule covers, with the reason.
    """

    labels: LabelMap = field(default_factory=LabelMap)
    readouts: dict[fx.Node, Readout] = field(default_factory=dict)
    blocked: dict[fx.Node, str] = field(default_factory=dict)


def runs_along(node: fx.Node, labels: LabelMap) -> bool:
    """Whether any operand of ``node`` runs along a token axis."""
    return any(known.any_tokens() for operand in node.all_input_nodes if (known := labels.get(operand)) is not None)


def propagate(nodes: Iterable[fx.Node], seeds: Mapping[fx.Node, Labels], *, beyond_joins: bool = True) -> Flow:
    """Run the rule table over ``nodes`` from the labels in ``seeds``.

    Args:
        nodes: Nodes in the order of the graph.
        seeds: Labels to begin with.
        beyond_joins: Whether to go on where tokens are concatenated with others.
    """
    flow = Flow(labels=LabelMap(seeds))
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
            if isinstance(outcome.readout, ConcatenationReadout) and not beyond_joins:
                continue
        labels = outcome.labels
        if isinstance(labels, ResultLabels) or (labels is not None and labels.any_tokens()):
            flow.labels[node] = labels
    return flow
