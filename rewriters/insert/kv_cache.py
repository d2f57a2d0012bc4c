"""Key/value cache: hide from attention the slots of tokens that an earlier, pruned call dropped.

Start at :func:`hide_dead`. A call that continues an earlier one takes the cached tensors, appends to them and attends.
Where a slot is marked as dead (``madtp/tokens/cache_marks.py``) no query may see it. Each cached tensor is followed
through the graph; anything but attention that reads its slots is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import fx
from torch.fx.node import Argument

from madtp.calls.call import Call
from madtp.calls.objects import ResultSpec
from madtp.tokens import cache_marks as runtime
from madtp.tokens.cache_marks import MarkedAxes
from rewriters.axes.arguments import dim_argument, items
from rewriters.axes.labels import seed
from rewriters.axes.propagate import Flow, propagate
from rewriters.axes.readouts import LengthReadout
from rewriters.graph.nodes import AxisError, example_shape, op_name
from rewriters.graph.op_sets import CONCATENATIONS, MAP_STEPS
from rewriters.graph.walk import ancestors


def hide_dead(graph: fx.Graph, call: Call, returned: ResultSpec, marked: Mapping[str, MarkedAxes]) -> None:
    """Give every attention that reads cached tensors the slots it may see, in place.

    Args:
        graph: The captured graph.
        call: The opened call that was captured.
        returned: What came out of it.
        marked: Cached tensors that may have dead slots, by their path in the object that holds them.

    Raises:
        AxisError: A cached tensor is read by something else than attention, or is not appended to.
    """
    output = next(n for n in graph.nodes if n.op == "output")
    cached = _cached(graph, call, returned, output)
    lost = [path for path in marked if path not in cached]
    if lost:
        raise AxisError(f"the cached tensor at {lost[0]} is not returned")
    updated = {path: _updated(cached[path], marked[path]) for path in marked}
    labels = {
        value: seed(example_shape(value), marked[path].batch_dim, marked[path].token_dim, "kept")
        for path, value in updated.items()
    }
    flow = propagate(graph.nodes, labels)
    _check(flow, set(labels), output)
    states: dict[fx.Node, fx.Node] = {}
    reads = [(node, _origins(node, flow, updated)) for node in graph.nodes if op_name(node) == "attention"]
    for path, value in updated.items():
        axes = marked[path]
        state = _after(graph, value, runtime.cache_state, (axes.token_dim, axes.batch_dim))
        states[value] = state
        clean = _after(graph, value, runtime.zero_marked)
        clean.meta = {"val": value.meta["val"], "nn_module_stack": value.meta.get("nn_module_stack", {})}
        for user in list(value.users):
            if user not in (output, clean, state):
                user.replace_input_with(value, clean)
    for node, origins in reads:
        if not origins:
            continue
        if len({marked[path].tokens for path in origins}) > 1:
            raise AxisError("the key/value cache holds keys and values of different tokens")
        node.kwargs = {**node.kwargs, "key_state": states[updated[origins[0]]]}
    graph.lint()


class _Cached(NamedTuple):
    """A cached tensor as it comes in, and as it goes out."""

    before: fx.Node
    after: Argument


def _cached(graph: fx.Graph, call: Call, returned: ResultSpec, output: fx.Node) -> dict[str, _Cached]:
    """Cached tensors, by their path in the object that holds them."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    coming = [placeholders[leaf] for leaf in sorted(call.cache_leaves())]
    paths = call.objects.paths() if call.objects else ()
    results = items(output, 0)
    going = dict(zip(returned.paths(), results[len(results) - len(returned.paths()) :], strict=True))
    if len(set(paths)) < len(paths) or len(going) < len(returned.paths()):
        raise AxisError("several objects hold cached tensors under one name")
    return {path: _Cached(node, going[path]) for path, node in zip(paths, coming, strict=True) if path in going}


def _updated(cached: _Cached, axes: MarkedAxes) -> fx.Node:
    """The cached tensor as it goes out: as it came in, or with further tokens appended."""
    before, after = cached
    if after is before:
        return before
    others = [user for user in before.users if user is not after and op_name(user) != "sym_size"]
    if not isinstance(after, fx.Node) or not _appends(after, before, axes.token_dim) or others:
        raise AxisError(
            f"a cached tensor is not appended to along its tokens, or is read elsewhere too ({before.name})"
        )
    return after


def _appends(node: fx.Node, before: fx.Node, dim: int) -> bool:
    """Whether ``node`` concatenates ``before`` with others along ``dim``."""
    if op_name(node) not in CONCATENATIONS or before not in node.all_input_nodes:
        return False
    return dim_argument(node, 1, len(example_shape(node)), default=0) == dim


def _check(flow: Flow, cached: set[fx.Node], output: fx.Node) -> None:
    """Refuse whatever reads cached tokens but attention, which is told which of them are dead."""
    for node, reason in flow.blocked.items():
        raise AxisError(f"cached tokens are read by {node.name}: {reason}")
    for node, readout in flow.readouts.items():
        if not isinstance(readout, LengthReadout):
            raise AxisError(f"cached tokens are read by {node.name}, not by attention alone")
    for node in flow.labels:
        if op_name(node) in MAP_STEPS:
            raise AxisError(f"cached tokens are read by {node.name}, an attention map that keeps its own spelling")
    for value in output.all_input_nodes:
        if value in flow.labels and value not in cached:
            raise AxisError(f"{value.name}, computed from cached tokens, is returned")


def _origins(attention: fx.Node, flow: Flow, updated: Mapping[str, fx.Node]) -> list[str]:
    """Paths of the cached tensors that an attention reads as keys and values; they have to be whole samples."""
    found: list[str] = []
    cached = set(updated.values())
    for operand in attention.args[:3]:
        labels = flow.labels.tensor(operand)
        if not isinstance(operand, fx.Node) or labels is None or not labels.any_tokens():
            continue
        if labels.batch_dim() != 0:
            raise AxisError("cached keys are folded together with other dimensions")
        for node in ancestors(operand, through=lambda n: n not in cached, among=lambda n: n in flow.labels):
            found.extend(path for path, value in updated.items() if value is node)
    return found


def _after(graph: fx.Graph, value: fx.Node, target: Callable[..., object], arguments: tuple[int, ...] = ()) -> fx.Node:
    """A call of ``target`` with ``value`` and further arguments, as early as possible."""
    last = value
    if value.op == "placeholder":
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        return graph.call_function(target, (value, *arguments))
