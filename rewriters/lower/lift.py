"""Lift: calls of known leaf modules become ``call_module`` nodes on the host's own submodules again.

Start at :func:`lift`. The module path that export recorded tells which call was whose; a call is lifted only if the
operation is all that its module issues and its operands are exactly that module's parameters. Hooks, adapters and
quantisation then find the modules they look for, dropout follows ``train()`` and ``eval()``, and the graph prints
like the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from rewriters.graph.nodes import attribute, module_path, op_name, operand


@dataclass(frozen=True)
class Leaf:
    """Modules whose whole forward is one operation.

    Attributes:
        modules: Classes of these modules.
        parameters: Names of their parameters, in the order of the operands behind the input.
    """

    modules: tuple[type[nn.Module], ...]
    parameters: tuple[str, ...] = ()


LEAVES = {
    "linear": Leaf((nn.Linear,), ("weight", "bias")),
    "layer_norm": Leaf((nn.LayerNorm,), ("weight", "bias")),
    "rms_norm": Leaf((nn.RMSNorm,), ("weight",)),
    "conv2d": Leaf((nn.Conv2d,), ("weight", "bias")),
    "dropout": Leaf((nn.Dropout,)),
    "gelu": Leaf((nn.GELU,)),
    "relu": Leaf((nn.ReLU,)),
    "silu": Leaf((nn.SiLU,)),
    "tanh": Leaf((nn.Tanh,)),
    "sigmoid": Leaf((nn.Sigmoid,)),
}
EMBEDDING = Leaf((nn.Embedding,), ("weight",))


def lift(graph: fx.Graph, host: nn.Module) -> int:
    """Lift calls in place.

    Args:
        graph: The graph.
        host: The module that was captured, whose submodules the graph is to call.

    Returns:
        How many calls were lifted.
    """
    lifted = 0
    issued: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            issued.setdefault(module_path(node), set()).add(op_name(node))
    for node in list(graph.nodes):
        if node.op != "call_function" or len(issued[module_path(node)]) != 1:
            continue
        if op_name(node) == "embedding":
            lifted += _lift_embedding(graph, node, host)
        elif op_name(node) in LEAVES:
            lifted += _lift_leaf(graph, node, host)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return lifted


def _lift_leaf(graph: fx.Graph, node: fx.Node, host: nn.Module) -> bool:
    leaf = LEAVES[op_name(node)]
    module = _issuer(node, host, leaf)
    if module is None or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    operands = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
    wanted = [f"{module_path(node)}.{n}" for n in leaf.parameters if getattr(module, n, None) is not None]
    if [str(o.target) for o in operands] != wanted or any(o.op != "get_attr" for o in operands):
        return False
    if isinstance(module, nn.GELU) and node.kwargs.get("approximate", "none") != module.approximate:
        return False
    _call_module(graph, node, node.args[0])
    return True


def _lift_embedding(graph: fx.Graph, node: fx.Node, host: nn.Module) -> bool:
    weight = operand(node, 0)
    if _issuer(node, host, EMBEDDING) is None or weight.target != f"{module_path(node)}.weight":
        return False
    _call_module(graph, node, operand(node, 1))
    return True


def _issuer(node: fx.Node, host: nn.Module, leaf: Leaf) -> nn.Module | None:
    """The submodule that issued ``node``; None if its forward may be more than the operation."""
    path = module_path(node)
    if not path:
        return None
    try:
        module = attribute(host, path)
    except AttributeError:
        return None
    # A subclass with a forward of its own may take other arguments than the operation (positions that it counts itself, say).
    return module if any(type(module).forward is kind.forward for kind in leaf.modules) else None


def _call_module(graph: fx.Graph, node: fx.Node, value: fx.Node) -> None:
    """Replace ``node`` by a call of the submodule that issued it."""
    with graph.inserting_before(node):
        call = graph.call_module(module_path(node), (value,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
