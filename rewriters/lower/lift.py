"""Lift: calls of known leaf modules become ``call_module`` nodes on the host's own submodules again.

Start at :func:`lift`. The module path that export recorded tells which call was whose; a call is lifted only if the
operation is all that its module issues and its operands are exactly that module's parameters. Hooks, adapters and
quantisation then find the modules they look for, dropout follows ``train()`` and ``eval()``, and the graph prints
like the model.
"""

from __future__ import annotations

from torch import fx, nn

from rewriters.graph.nodes import attribute, module_path, op_name

# Operation -> modules that issue it as their whole forward, with the names of their parameters in operand order after
# the input.
LEAVES: dict[str, tuple[tuple[type[nn.Module], ...], tuple[str, ...]]] = {
    "linear": ((nn.Linear,), ("weight", "bias")),
    "layer_norm": ((nn.LayerNorm,), ("weight", "bias")),
    "rms_norm": ((nn.RMSNorm,), ("weight",)),
    "conv2d": ((nn.Conv2d,), ("weight", "bias")),
    "dropout": ((nn.Dropout,), ()),
    "gelu": ((nn.GELU,), ()),
    "relu": ((nn.ReLU,), ()),
    "silu": ((nn.SiLU,), ()),
    "tanh": ((nn.Tanh,), ()),
    "sigmoid": ((nn.Sigmoid,), ()),
}


def lift(graph: fx.Graph, host: nn.Module) -> int:
    """Lift in place; returns how many calls were lifted."""
    lifted = 0
    issued: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            issued.setdefault(module_path(node), set()).add(op_name(node))
    for node in list(graph.nodes):
        if node.op != "call_function" or len(issued[module_path(node)]) != 1:
            continue
        name = op_name(node)
        if name == "embedding":
            lifted += _lift_embedding(graph, node, host)
        elif name in LEAVES:
            lifted += _lift(graph, node, host, *LEAVES[name])
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return lifted


def _issuer(node: fx.Node, host: nn.Module, kinds: tuple[type[nn.Module], ...]) -> tuple[str, nn.Module] | None:
    path = module_path(node)
    if not path:
        return None
    try:
        module = attribute(host, path)
    except AttributeError:
        return None
    # A subclass with a forward of its own may take other arguments than the operation (positions that it counts itself, say).
    own = any(type(module).forward is kind.forward for kind in kinds)
    return (path, module) if own else None


def _lift(
    graph: fx.Graph, node: fx.Node, host: nn.Module, kinds: tuple[type[nn.Module], ...], names: tuple[str, ...]
) -> int:
    found = _issuer(node, host, kinds)
    if found is None or not node.args or not isinstance(node.args[0], fx.Node):
        return 0
    path, module = found
    operands = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
    wanted = [f"{path}.{n}" for n in names if getattr(module, n, None) is not None]
    if [str(o.target) for o in operands] != wanted or any(o.op != "get_attr" for o in operands):
        return 0
    if isinstance(module, nn.GELU) and node.kwargs.get("approximate", "none") != module.approximate:
        return 0
    return _replace(graph, node, path, node.args[0])


def _lift_embedding(graph: fx.Graph, node: fx.Node, host: nn.Module) -> int:
    found = _issuer(node, host, (nn.Embedding,))
    weight = node.args[0]
    if found is None or not isinstance(weight, fx.Node) or weight.target != f"{found[0]}.weight":
        return 0
    assert isinstance(node.args[1], fx.Node)
    return _replace(graph, node, found[0], node.args[1])


def _replace(graph: fx.Graph, node: fx.Node, path: str, operand: fx.Node) -> int:
    with graph.inserting_before(node):
        call = graph.call_module(path, (operand,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return 1
