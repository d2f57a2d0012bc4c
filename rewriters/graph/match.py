"""Why a pattern does not fit: the nearest miss of each search for a spelling.

Start at :func:`attempt`, which wraps the search at one candidate (a softmax that may be attention). What does not fit raises
:class:`NoMatch`; the miss that came farthest is kept at the candidate, where :func:`nearest_miss` finds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import fx

from rewriters.graph.node_record import record, set_record
from rewriters.graph.nodes import AxisError, op_name


@dataclass(frozen=True)
class Miss:
    """Where a pattern ceases to fit.

    Attributes:
        node: the first node that does not fit.
        reason: what was found there, as a clause.
        help: what would fit instead.
        steps: what the search had recognised until then, in its order.
    """

    node: fx.Node
    reason: str
    help: str
    steps: tuple[str, ...] = ()

    def __str__(self) -> str:
        behind = f" (recognised up to there: {', '.join(self.steps)})" if self.steps else ""
        return f"{self.reason}{behind}"


class NoMatch(Exception):
    """A candidate does not fit the pattern; carries the :class:`Miss`."""

    def __init__(self, node: fx.Node, reason: str, help: str, steps: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.miss = Miss(node, reason, help, steps)


def farthest(misses: Iterable[Miss]) -> Miss:
    """The miss that recognised most; the first of several."""
    return max(misses, key=lambda miss: len(miss.steps))


@contextmanager
def attempt(candidate: fx.Node, help: str, steps: tuple[str, ...] = ()) -> Iterator[None]:
    """Search for a pattern at ``candidate``; where it does not fit, remember why, and go on behind the ``with`` block.

    Args:
        candidate: the node that the search starts at.
        help: what would help where shapes do not fit, which the operations' own errors do not say.
        steps: what was recognised before.
    """
    try:
        yield
    except NoMatch as error:
        remember(candidate, error.miss)
    except AxisError as error:
        remember(candidate, Miss(candidate, str(error), help, steps))


def remember(candidate: fx.Node, miss: Miss) -> None:
    """Keep ``miss`` at ``candidate``, unless an earlier one came farther."""
    known = nearest_miss(candidate)
    nearest = miss if known is None else farthest((known, miss))
    set_record(candidate, replace(record(candidate), nearest_miss=nearest))


def nearest_miss(candidate: fx.Node) -> Miss | None:
    """The miss that came farthest of all searches at ``candidate``; None if there was none."""
    return record(candidate).nearest_miss


def operation(node: fx.Node) -> fx.Node:
    """The operation that a message names for ``node``: for an item of a tuple, what yields the tuple."""
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        return operation(node.args[0])
    return node


def described(node: fx.Node) -> str:
    """An operation as a message names it: ``aten.sort``, with the reason, if known, why it has no plainer form."""
    namespace = getattr(node.target, "namespace", None)
    name = f"{namespace}.{op_name(node)}" if namespace else op_name(node)
    return name + because(node)


def because(node: fx.Node) -> str:
    """Why ``node`` has no plainer form, in parentheses to follow its name; empty if nothing is known."""
    miss = nearest_miss(node)
    return "" if miss is None else f" ({miss.reason})"
