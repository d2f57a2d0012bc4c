"""Programs: start at :class:`Program`, one rewritten graph that is compiled, with what is needed to call and to price it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import batch_size
from madtp.calls.objects import ResultSpec
from madtp.calls.size_limits import SizeLimits
from madtp.calls.structures import unflatten
from madtp.cost.table import CostTable
from madtp.programs.autocast_dtypes import KnownDtypes, autocast_of
from madtp.programs.compiled_graph import CompiledForward
from madtp.tokens.cache_marks import MarkedAxes
from madtp.tokens.state import TokenState

Result = TypeVar("Result")


@dataclass(kw_only=True)
class Program:
    """A graph that is ready to run on the module tree it was made for.

    Attributes:
        repeats: how often each sample of a call runs.
        graph: the rewritten graph, for reading.
        forward: the graph, compiled.
        checkpointed_forward: ``forward`` with gradient checkpointing. None until it is first needed.
        out_spec: structure of the outputs.
        dynamic: the free dimensions of each flattened input; all other sizes are those of the capture.
        limits: bounds on the free sizes.
        cost: closed form of the multiply-accumulates.
        constants: tensors that the graph holds itself, by name.
        returned: how to close the objects that it returns opened. None if it returns none.
        marked: the tensors of these objects that may hold marks of dropped tokens, by path.
        output_sites: the site that has dropped image tokens of an output ``[B, N, C]`` last, by position of the output.
        given: paths of the numbers, in the objects of a call, that the graph takes as sizes.
        autocast_dtypes: the dtypes of the original's outputs, by type of autocast; see ``autocast_dtypes.py``.
        turns_back: it may find that the model's Python goes another way after it has drawn numbers or written to tensors.
        own_backward: functions with a backward pass of their own, which the graph has lost: it has other gradients.
        lost_gradients: parameters and inputs to which the original passes gradients, and the graph does not.
        unshielded: it serves calls without autocast alone.
        fills: the original changes a container that it is given, such as a dictionary, and the graph does not.
        unpruned: why it prunes nothing although its module has sites; empty if it prunes, or has none.
        padded: why values of pruned streams are padded on their way, where they are not packed rows throughout.
    """

    repeats: ClassVar[int] = 1

    graph: fx.Graph
    forward: CompiledForward
    out_spec: pytree.TreeSpec
    dynamic: tuple[tuple[int, ...], ...]
    cost: CostTable
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    returned: ResultSpec | None = None
    marked: Mapping[str, MarkedAxes] = field(default_factory=dict)
    output_sites: Mapping[int, str] = field(default_factory=dict)
    limits: SizeLimits = field(default_factory=SizeLimits)
    given: tuple[str, ...] = ()
    unpruned: str = ""
    padded: tuple[str, ...] = ()
    turns_back: bool = False
    own_backward: tuple[str, ...] = ()
    lost_gradients: tuple[str, ...] = ()
    unshielded: bool = False
    fills: bool = False
    checkpointed_forward: CompiledForward | None = None
    autocast_dtypes: KnownDtypes = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """Names of the sites in the graph."""
        return list(self.cost.streams)

    def sizes(self) -> tuple[str, ...]:
        """Paths of the numbers, in the objects that it returns, that follow from sizes of tensors."""
        return () if self.returned is None else self.returned.sizes()

    def cache_types(self) -> set[type]:
        """Classes of the objects that it returns in which dropped tokens are missing."""
        objects = () if self.returned is None else self.returned.objects
        return {one.kind for one in objects if not self.marked.keys().isdisjoint(one.paths())}

    def dense_macs(self, leaves: Sequence[object]) -> float:
        """Multiply-accumulates per sample of a call with pruning off."""
        return sum(self.cost.price(leaves, {}, False).values())

    def serves(self, leaves: Sequence[object]) -> bool:
        """Whether the free sizes of a call, and autocast around it, are within what the graph was captured for."""
        return self.limits.allow(leaves) and not (self.unshielded and autocast_of(leaves) is not None)

    def computes_as(self, other: Program) -> bool:
        """Whether another program's graph is the same, operation by operation."""
        own, its = self._described(), other._described()
        same = own == its and self.dynamic == other.dynamic and len(self.constants) == len(other.constants)
        return same and all(map(_same_tensor, self.constants.values(), other.constants.values()))

    def _described(self) -> list[tuple[str, str, str, str]]:
        names = {name: f"constant {number}" for number, name in enumerate(self.constants)}
        return [
            (
                node.op,
                names.get(str(node.target).rpartition(".")[2], str(node.target)),
                str(node.args),
                str(node.kwargs),
            )
            for node in self.graph.nodes
        ]

    def run(self, root: nn.Module, leaves: Sequence[object]) -> object:
        """Run the graph.

        Args:
            root: the module tree.
            leaves: flattened inputs.

        Returns:
            What the model returns, objects opened.
        """
        return unflatten(self.outputs(self.forward, root, leaves), self.out_spec)

    def run_checkpointed(self, root: nn.Module, leaves: Sequence[object]) -> object:
        """:meth:`run` with gradient checkpointing."""
        assert self.checkpointed_forward is not None
        return unflatten(self.outputs(self.checkpointed_forward, root, leaves), self.out_spec)

    def outputs(self, forward: CompiledForward, root: nn.Module, leaves: Sequence[object]) -> list[object]:
        """What ``forward`` returns for flattened inputs."""
        return list(forward(root, *leaves))


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def without_gradients(operation: Callable[..., Result], *args: object, **kwargs: object) -> Result:
    """Run an operation that writes to a tensor, such as a parameter, as in a block of code without gradients."""
    with torch.no_grad():
        return operation(*args, **kwargs)


def without_autocast(operation: Callable[..., Result], device_type: str, *args: object, **kwargs: object) -> Result:
    """``operation(*args, **kwargs)`` at the precision of its operands, whatever autocast is around it."""
    with torch.autocast(device_type, enabled=False):
        return operation(*args, **kwargs)


@dataclass(frozen=True)
class Run:
    """One program that ran in the last forward.

    Attributes:
        program: the program that ran.
        inputs: its flattened inputs; tensors are on the meta device, without their values.
        states: the token state after each of its sites.
    """

    program: Program
    inputs: tuple[object, ...]
    states: Mapping[str, TokenState]

    def batch(self) -> int:
        """Number of samples that went through."""
        return batch_size(self.inputs) // self.program.repeats

    def share(self, samples: int | None) -> float:
        """Number of samples that went through, as a fraction of those of the call; 1 if that number is not known."""
        return 1.0 if samples is None else self.batch() / samples
