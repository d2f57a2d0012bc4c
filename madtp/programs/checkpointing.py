"""Gradient checkpointing of a rewritten graph: it runs in pieces, and the backward computes each piece once more.

Start at :func:`in_pieces`. A graph is cut at its sites and, where blocks have none, at its narrowest place between two
attentions, so a piece is about a block and what is kept between forward and backward is the residual stream. Sites
themselves run once, between pieces: which tokens survive is decided once, and pieces are computed again for exactly those.
So do batch norms, whose running statistics would count a batch twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from madtp.programs.program import compile_graph
from madtp.sites.scoring import ScoringAttention
from madtp.sites.site import PruningSite
from madtp.tokens.attention import attention

_STATEMENTS = ("call_module", "call_function", "call_method")


@dataclass(frozen=True)
class Piece:
    """Consecutive statements of a graph.

    forward: (module tree, inputs) -> outputs. inputs, outputs: names of values, in order. spent: values that nothing later
    reads. once: whether its results are kept for the backward, all of them.
    """

    forward: Callable[..., tuple[Any, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spent: tuple[str, ...]
    once: bool


def in_pieces(graph: fx.Graph, root: nn.Module, name: str) -> Callable[..., Any]:
    """The graph as a function of the module tree and its inputs, like :func:`madtp.programs.program.compile_graph`'s.

    Args:
        graph: of a program.
        root: the module tree that it runs on.
        name: of the program, for tracebacks.
    """
    stretches = _stretches(graph, root)
    output = next(node for node in graph.nodes if node.op == "output")
    stretches[-1].append(output)
    place = {node: number for number, part in enumerate(stretches) for node in part}
    last = {
        node: max((place[user] for user in node.users), default=-1) for node in graph.nodes if node.op != "get_attr"
    }
    pieces = []
    for number, part in enumerate(stretches):
        read = dict.fromkeys(n for node in part for n in node.all_input_nodes if n.op != "get_attr")
        inputs = [node for node in read if place.get(node) != number]
        outputs = [node for node in part if node.op != "output" and last[node] > number]
        spent = tuple(node.name for node in inputs if last[node] == number)
        # What the last piece keeps is needed at once.
        once = number == len(stretches) - 1 or _runs_once(part[0], root)
        forward = compile_graph(_piece(part, inputs, outputs), f"{name} piece {number}")
        pieces.append(Piece(forward, _names(inputs), _names(outputs), spent, once))
    placeholders = _names(node for node in graph.nodes if node.op == "placeholder")

    def run(tree: nn.Module, *leaves: Any) -> Any:
        values = dict(zip(placeholders, leaves, strict=True))
        for piece in pieces[:-1]:
            inputs = [values[name] for name in piece.inputs]
            results = piece.forward(tree, *inputs) if piece.once else _recomputed(piece.forward, tree, inputs)
            for name in piece.spent:
                del values[name]
            values.update(zip(piece.outputs, results, strict=True))
        return pieces[-1].forward(tree, *(values[name] for name in pieces[-1].inputs))

    return run


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _stretches(graph: fx.Graph, root: nn.Module) -> list[list[fx.Node]]:
    """The statements of a graph, cut up."""
    found: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op not in _STATEMENTS:
            continue
        if _runs_once(node, root):
            found += [[node], []]
        else:
            found[-1].append(node)
    return [part for stretch in found if stretch for part in _between_attentions(stretch, root)] or [[]]


def _between_attentions(stretch: list[fx.Node], root: nn.Module) -> list[list[fx.Node]]:
    """A stretch cut where the fewest values pass, once between two attentions."""
    attentions = [number for number, node in enumerate(stretch) if _attends(node, root)]
    if len(attentions) < 2:
        return [stretch]
    place = {node: number for number, node in enumerate(stretch)}
    ends = [max((place.get(user, len(stretch)) for user in node.users), default=-1) for node in stretch]
    cuts = [0]
    for before, after in pairwise(attentions):
        # Values from in front of the stretch pass at every place alike; only its own count.
        passing = [sum(end >= cut for end in ends[:cut]) for cut in range(before + 1, after + 1)]
        cuts.append(before + 1 + passing.index(min(passing)))
    cuts.append(len(stretch))
    return [stretch[start:stop] for start, stop in pairwise(cuts)]


def _attends(node: fx.Node, root: nn.Module) -> bool:
    return node.target is attention or _calls(node, root, ScoringAttention)


def _runs_once(node: fx.Node, root: nn.Module) -> bool:
    return "batch_norm" in str(node.target) or _calls(node, root, PruningSite, _BatchNorm)


def _calls(node: fx.Node, root: nn.Module, *kinds: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), kinds)


def _piece(part: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    """A graph of some statements: what they read of the module tree included."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in inputs}

    def value(node: fx.Node) -> fx.Node:
        if node not in env:  # of the module tree, or a statement of the part
            env[node] = graph.node_copy(node, value)
        return env[node]

    for node in part:
        value(node)
    if part and part[-1].op == "output":
        return graph
    graph.output(tuple(env[node] for node in outputs))
    return graph


def _recomputed(forward: Callable[..., tuple[Any, ...]], tree: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...]:
    # Inputs that are changed in place before the backward has read them again are an error of torch's.
    return checkpoint(forward, tree, *inputs, use_reentrant=False, context_fn=_same_kernels)  # type: ignore[no-any-return]


def _same_kernels() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around the forward and around its repetition, which has to choose the attention kernel that the forward chose."""
    return nullcontext(), sdpa_kernel(allowed_kernels())


def allowed_kernels() -> list[SDPBackend]:
    """The attention kernels that torch may choose from here."""
    allowed = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return [kernel for kernel, on in allowed.items() if on]
