"""Continuation: hide from attention what an earlier, pruned call has dropped from keys and values that are kept.

Start at :func:`hide_dead`. A call that continues an earlier one takes the kept tensors, appends to them and attends.
Where a slot is marked as dead (``madtp/tokens/cache_marks.py``) no query may see it. Each kept tensor is followed
through the graph; anything but attention that reads its slots is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from madtp.calls.call import Call
from madtp.calls.objects import ResultSpec
from madtp.tokens import cache_marks as runtime
from madtp.tokens.cache_marks import MarkedAxes
from rewriters.axes.labels import Axis, Factor, any_tokens, plain
from rewriters.axes.outcome import batch_dim_of, labels_of
from rewriters.axes.propagate import Flow, propagate
from rewriters.graph.nodes import AxisError, call_argument, example_shape, normal_dim, op_name


def hide_dead(graph: fx.Graph, call: Call, returned: ResultSpec, marked: Mapping[str, MarkedAxes]) -> None:
    """Give every attention that reads kept tensors the slots it may see, in place.

    Args:
        call: the opened call that was captured. returned: what came out of it.
        marked: kept tensors that may have dead slots, by their path in the object that holds them.
    Raises:
        AxisError: a kept tensor is read by something else than attention, or is not appended to.
    """
    output = next(n for n in graph.nodes if n.op == "output")
    kept = _kept(graph, call, returned, output)
    lost = [path for path in marked if path not in kept]
    if lost:
        raise AxisError(f"what was kept at {lost[0]} is not handed on")
    updated = {path: _updated(*kept[path], marked[path], output) for path in marked}
    labels = {value: _labels(value, marked[path]) for path, value in updated.items()}
    flow = propagate(graph.nodes, labels)
    _check(flow, set(labels), output)
    states: dict[fx.Node, fx.Node] = {}
    reads = [(node, _origins(node, flow, updated)) for node in graph.nodes if op_name(node) == "attention"]
    for path, value in updated.items():
        axes = marked[path]
        state = _after(graph, value, runtime.cache_state, (axes.token_dim, axes.batch_dim))
        states[value] = state
        clean = _after(graph, value, runtime.zero_marked, ())
        clean.meta = {"val": value.meta["val"], "nn_module_stack": value.meta.get("nn_module_stack", {})}
        for user in list(value.users):
            if user not in (output, clean, state):
                user.replace_input_with(value, clean)
    for node, origins in reads:
        if not origins:
            continue
        if len({marked[path].tokens for path in origins}) > 1:
            raise AxisError("keys and values were kept of different tokens")
        node.kwargs = {**node.kwargs, "key_state": states[updated[origins[0]]]}
    graph.lint()


def _kept(graph: fx.Graph, call: Call, returned: ResultSpec, output: fx.Node) -> dict[str, tuple[fx.Node, fx.Node]]:
    """Kept tensors by path: as they come in, and as they go out."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    coming = [placeholders[leaf] for leaf in sorted(call.cache_leaves())]
    paths = call.objects.paths() if call.objects else ()
    results: Any = output.args[0]
    going = dict(zip(returned.paths(), results[len(results) - len(returned.paths()) :], strict=True))
    if len(set(paths)) < len(paths) or len(going) < len(returned.paths()):
        raise AxisError("tensors are kept under one name in several objects")
    return {path: (node, going[path]) for path, node in zip(paths, coming, strict=True) if path in going}


def _updated(coming: fx.Node, going: Any, axes: MarkedAxes, output: fx.Node) -> fx.Node:
    """The kept tensor as it goes out: as it came in, or with further tokens appended."""
    if going is coming:
        return going
    appended = isinstance(going, fx.Node) and op_name(going) in ("cat", "concat") and coming in going.all_input_nodes
    if appended:
        appended = normal_dim(call_argument(going, 1, "dim", 0), len(example_shape(going))) == axes.token_dim
    others = [user for user in coming.users if user is not going and op_name(user) != "sym_size"]
    if not appended or others:
        raise AxisError(f"what was kept is not appended to along its tokens, or read beside that ({coming.name})")
    return going


def _labels(value: fx.Node, axes: MarkedAxes) -> Any:
    shape = example_shape(value)
    labels = [plain(n) for n in shape]
    labels[axes.batch_dim] = (Factor(Axis("batch", "kept"), shape[axes.batch_dim]),)
    labels[axes.token_dim] = (Factor(Axis("tokens", "kept"), shape[axes.token_dim]),)
    return tuple(labels)


def _check(flow: Flow, kept: set[fx.Node], output: fx.Node) -> None:
    """Refuse whatever reads kept tokens but attention, which is told which of them are dead."""
    for node, reason in flow.blocked.items():
        raise AxisError(f"kept tokens are read by {node.name}: {reason}")
    for node, readout in flow.readouts.items():
        if readout.kind != "length":
            raise AxisError(f"kept tokens are read by {node.name}, not by attention alone")
    for node in flow.labels:
        if op_name(node) in ("shares", "total", "weigh"):
            raise AxisError(f"kept tokens are read by {node.name}, an attention map of the model's own making")
    for value in output.all_input_nodes:
        if value in flow.labels and value not in kept:
            raise AxisError(f"{value.name}, computed from kept tokens, is returned")


def _origins(attention: fx.Node, flow: Flow, updated: Mapping[str, fx.Node]) -> list[str]:
    """Paths of the kept tensors that an attention reads as keys and values; they have to be whole samples."""
    found: list[str] = []
    for operand in attention.args[:3]:
        labels = labels_of(operand, flow.labels)
        if not any_tokens(labels):
            continue
        if batch_dim_of(labels) != 0:
            raise AxisError("kept keys are folded together with other dimensions")
        stack, seen = [operand], {operand}
        while stack:
            node: Any = stack.pop()
            found.extend(path for path, value in updated.items() if value is node)
            if node in updated.values():
                continue
            for source in node.all_input_nodes:
                if source in flow.labels and source not in seen:
                    seen.add(source)
                    stack.append(source)
    return found


def _after(graph: fx.Graph, value: fx.Node, target: Any, arguments: tuple[int, ...]) -> fx.Node:
    last = value
    if value.op == "placeholder":
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        return graph.call_function(target, (value, *arguments))
