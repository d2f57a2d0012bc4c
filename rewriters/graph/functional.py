"""Functional: in-place writes become values of their own, so that every later stage sees them as data flow.

Start at :func:`functional`. A write through views (``out[i, :n] = x``) is carried back to the tensor that owns the memory: that
tensor's new value is the old one with the part scattered into it, and later readers read the new value.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch._ops import OpOverload

from madtp.calls.branches import expect
from rewriters.graph.nodes import op_name, operand
from rewriters.graph.walk import operand_chain, positions, walk

aten = torch.ops.aten
# Operations whose result shares the memory of their first operand.
SHARE_MEMORY = frozenset(
    "view transpose permute t expand unsqueeze squeeze select slice alias detach chunk split split_with_sizes unbind getitem "
    "unflatten narrow diagonal unfold movedim swapaxes view_as expand_as".split()
)
# Operations whose result may share it, or be a copy.
MAY_SHARE_MEMORY = frozenset("reshape reshape_as flatten contiguous to type_as dropout feature_dropout".split())
# View -> the operation that puts a new part back into the whole.
SCATTERS = {"slice": aten.slice_scatter.default, "select": aten.select_scatter.default}


def functional(graph: fx.Graph) -> None:
    """Turn in-place operations into functional ones.

    Writes to inputs, to parameters and to memory that is read through views of other kinds are left as they are. If they touch
    tokens, they are refused later.
    """
    order = positions(graph)
    for node in list(graph.nodes):
        overload = _functional_form(node)
        if overload is not None and isinstance(node.args[0], fx.Node):
            _replace(graph, node, overload, order)


def writes(node: fx.Node) -> bool:
    """Whether ``node`` changes one of its operands."""
    target = node.target
    return isinstance(target, OpOverload) and target._schema.is_mutable


def has_effect(node: fx.Node) -> bool:
    """Whether ``node`` matters even if nothing reads its result."""
    return writes(node) or node.target is expect


def _functional_form(node: fx.Node) -> OpOverload | None:
    """The operation that computes what ``node`` writes; None if it writes nothing or there is none."""
    target = node.target
    if not writes(node) or not isinstance(target, OpOverload) or not node.args:
        return None
    name = target.overloadpacket.__name__
    if not name.endswith("_"):
        return None
    base = name[:-1] if not name.endswith("__") else f"__{name.strip('_')[1:]}__"
    packet = getattr(aten, base, None)
    overload = None if packet is None else getattr(packet, target._overloadname, None)
    return overload if isinstance(overload, OpOverload) else None


def _replace(graph: fx.Graph, node: fx.Node, overload: OpOverload, order: dict[fx.Node, int]) -> None:
    mutated = operand(node)
    chain = list(_chain(mutated))
    owner = chain[-1]
    family = _family(owner, order, order[node])
    seen = [n for n in family if n is not mutated and _read_later(n, node, order)]
    given = owner.op in ("placeholder", "get_attr")
    if given and (mutated is owner or seen or any(writes(n) for n in chain)):
        return
    if not seen:
        _compute(graph, node, overload, order)
        _read_instead(mutated, node, node, order)
        return
    views = [n for n in family if n is not owner and any(n in _chain(m) for m in (*seen, mutated))]
    if any(op_name(n) in MAY_SHARE_MEMORY for n in views) or any(op_name(n) not in SCATTERS for n in chain[:-1]):
        return
    _compute(graph, node, overload, order)
    renewed = _renew(graph, _scattered(graph, node, chain, order), owner, views, order)
    for old, new in (*renewed.items(), (node, renewed[mutated])):
        _read_instead(old, new, node, order)


def _compute(graph: fx.Graph, node: fx.Node, overload: OpOverload, order: dict[fx.Node, int]) -> None:
    """Turn the write into the computation of what it writes."""
    if overload.overloadpacket is not aten.copy:
        node.target = overload
        return
    # The functional copy has no derivative.
    old, new = operand(node), operand(node, 1)
    before, after = old.meta["val"], new.meta["val"]
    if before.dtype != after.dtype:
        with graph.inserting_before(node):
            new = graph.call_function(aten.to.dtype, (new, before.dtype))
        new.meta = {**node.meta, "val": after.to(before.dtype)}
        order[new] = order[node]
    node.target, node.args, node.kwargs = aten.expand_as.default, (new, old), {}


def _chain(node: fx.Node) -> Iterator[fx.Node]:
    """The node and what it is a view of, up to the owner of the memory."""
    return operand_chain(node, _shares)


def _shares(node: fx.Node) -> bool:
    """Whether the node may share the memory of its first operand. What stays a write does."""
    if writes(node) and node.args and isinstance(node.args[0], fx.Node):
        return True
    if op_name(node) not in SHARE_MEMORY | MAY_SHARE_MEMORY or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if op_name(node) == "getitem":
        return op_name(node.args[0]) in SHARE_MEMORY
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return op_name(node) != "to" or before is None or after is None or before.dtype == after.dtype


def _family(owner: fx.Node, order: dict[fx.Node, int], before: int) -> list[fx.Node]:
    """The owner and all nodes before a position that may share its memory, each after what it is a view of."""

    def views(node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if _shares(u) and u.args[0] is node and order[u] < before]

    return list(walk([owner], views))


def _read_later(node: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    return any(order[user] > order[write] for user in node.users)


def _read_instead(old: fx.Node, new: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> None:
    """What is computed after the write reads ``new`` for ``old``."""
    for user in list(old.users):
        if order[user] > order[write]:
            user.replace_input_with(old, new)


def _scattered(graph: fx.Graph, write: fx.Node, chain: list[fx.Node], order: dict[fx.Node, int]) -> fx.Node:
    """The owner's value after the write: the written part put back, view by view."""
    part = write
    for view in chain[:-1]:
        base = operand(view)
        with graph.inserting_after(part):
            whole = graph.call_function(SCATTERS[op_name(view)], (base, part, *view.args[1:]), view.kwargs)
        whole.meta = {**write.meta, "val": base.meta.get("val")}
        order[whole] = order[write]
        part = whole
    return part


def _renew(
    graph: fx.Graph, whole: fx.Node, owner: fx.Node, views: list[fx.Node], order: dict[fx.Node, int]
) -> dict[fx.Node, fx.Node]:
    """The owner's new value, and the views of it that replace those of the old value."""
    renewed, last = {owner: whole}, whole
    for view in views:
        with graph.inserting_after(last):
            last = renewed[view] = graph.node_copy(view, lambda n: renewed.get(n, n))
        last.meta = dict(view.meta)
        order[last] = order[whole]
    return renewed
