"""Gradient checkpointing of a rewritten graph: it runs in pieces, and the backward pass computes each piece once more.

Start at :func:`checkpointed`. A graph is cut at its sites and, where blocks have none, at its narrowest place between two
attentions. So a piece is about a block, and what is stored between forward and backward is the residual stream. Sites
run once, between pieces: which tokens survive is decided once, and pieces are recomputed for exactly those tokens. Batch norms
run once, too, as their running statistics would otherwise count a batch twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from madtp.programs.compiled_graph import CompiledForward, compile_graph
from madtp.sites.scoring import PackedScoringAttention, ScoringAttention
from madtp.sites.site import PruningSite
from madtp.sites.stream_start import StreamStart
from madtp.tokens.attention import attention
from madtp.tokens.packed_attention import packed_attention

_STATEMENTS = ("call_module", "call_function", "call_method")


@dataclass(frozen=True)
class _Piece:
    """Consecutive statements of a graph, compiled.

    Attributes:
        forward: takes the module tree and the inputs, returns the outputs.
        inputs: names of the values that it reads, in order.
        outputs: names of the values that later pieces read, in order.
        last_read: those of the inputs that no later piece reads.
        recomputed: whether the backward pass computes it once more; otherwise all its activations are stored.
    """

    forward: CompiledForward
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_read: tuple[str, ...]
    recomputed: bool


def checkpointed(graph: fx.Graph, root: nn.Module, name: str) -> CompiledForward:
    """Compile a graph, with gradient checkpointing.

    Args:
        graph: the graph of a program.
        root: the module tree that it runs on.
        name: the program's name, for tracebacks.

    Returns:
        A function like that of :func:`madtp.programs.compiled_graph.compile_graph`.
    """
    pieces = _compiled_pieces(graph, root, name)
    placeholders = _names(node for node in graph.nodes if node.op == "placeholder")

    def run(tree: nn.Module, *leaves: object) -> Iterable[object]:
        values = dict(zip(placeholders, leaves, strict=True))
        for piece in pieces[:-1]:
            inputs = [values[name] for name in piece.inputs]
            results = _recomputed(piece.forward, tree, inputs) if piece.recomputed else piece.forward(tree, *inputs)
            for name in piece.last_read:
                del values[name]
            values.update(zip(piece.outputs, results, strict=True))
        return pieces[-1].forward(tree, *(values[name] for name in pieces[-1].inputs))

    return run


def _compiled_pieces(graph: fx.Graph, root: nn.Module, name: str) -> list[_Piece]:
    stretches = _stretches(graph, root)
    output = next(node for node in graph.nodes if node.op == "output")
    stretches[-1].append(output)
    piece_of = {node: number for number, stretch in enumerate(stretches) for node in stretch}
    last_reader = {
        node: max((piece_of[user] for user in node.users), default=-1) for node in graph.nodes if node.op != "get_attr"
    }
    pieces = []
    for number, stretch in enumerate(stretches):
        read = dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n.op != "get_attr")
        inputs = [node for node in read if piece_of.get(node) != number]
        outputs = [node for node in stretch if node.op != "output" and last_reader[node] > number]
        # The backward pass needs the last piece first, so it would be recomputed at once.
        last = number == len(stretches) - 1
        pieces.append(
            _Piece(
                forward=compile_graph(_subgraph(stretch, inputs, outputs), f"{name} piece {number}"),
                inputs=_names(inputs),
                outputs=_names(outputs),
                last_read=_names(node for node in inputs if last_reader[node] == number),
                recomputed=not last and not _runs_once(stretch[0], root),
            )
        )
    return pieces


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _stretches(graph: fx.Graph, root: nn.Module) -> list[list[fx.Node]]:
    """The statements of a graph, cut into the stretches that become pieces."""
    stretches: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op not in _STATEMENTS:
            continue
        if _runs_once(node, root):
            stretches += [[node], []]
        else:
            stretches[-1].append(node)
    return [part for stretch in stretches if stretch for part in _cut_between_attentions(stretch, root)] or [[]]


def _cut_between_attentions(stretch: list[fx.Node], root: nn.Module) -> list[list[fx.Node]]:
    """Cut a stretch once between any two attentions, where the fewest values pass."""
    attentions = [number for number, node in enumerate(stretch) if _attends(node, root)]
    if len(attentions) < 2:
        return [stretch]
    place = {node: number for number, node in enumerate(stretch)}
    ends = [max((place.get(user, len(stretch)) for user in node.users), default=-1) for node in stretch]
    cuts = [0]
    for before, after in pairwise(attentions):
        # Values from before the stretch pass every place alike, so only its own count.
        passing = [sum(end >= cut for end in ends[:cut]) for cut in range(before + 1, after + 1)]
        cuts.append(before + 1 + passing.index(min(passing)))
    cuts.append(len(stretch))
    return [stretch[start:stop] for start, stop in pairwise(cuts)]


def _attends(node: fx.Node, root: nn.Module) -> bool:
    return node.target in (attention, packed_attention) or _calls(node, root, ScoringAttention, PackedScoringAttention)


def _runs_once(node: fx.Node, root: nn.Module) -> bool:
    return "batch_norm" in str(node.target) or _calls(node, root, PruningSite, StreamStart, _BatchNorm)


def _calls(node: fx.Node, root: nn.Module, *kinds: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), kinds)


def _subgraph(statements: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    """A graph of some statements, and of what they read of the module tree."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in inputs}

    def value(node: fx.Node) -> fx.Node:
        if node not in env:  # of the module tree, or one of the statements
            env[node] = graph.node_copy(node, value)
        return env[node]

    for node in statements:
        value(node)
    if statements and statements[-1].op == "output":
        return graph
    graph.output(tuple(env[node] for node in outputs))
    return graph


def _recomputed(forward: CompiledForward, tree: nn.Module, inputs: Sequence[object]) -> Iterable[object]:
    # If inputs are changed in place before the backward pass has read them again, torch raises an error.
    outputs: Iterable[object] = checkpoint(forward, tree, *inputs, use_reentrant=False, context_fn=_same_kernels)
    return outputs


def _same_kernels() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the forward and for its repetition, which has to choose the attention kernel that the forward chose."""
    return nullcontext(), sdpa_kernel(allowed_kernels())


_IS_ALLOWED: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


def allowed_kernels() -> list[SDPBackend]:
    """The attention kernels that torch may choose from at present."""
    return [kernel for kernel, is_allowed in _IS_ALLOWED.items() if is_allowed()]
