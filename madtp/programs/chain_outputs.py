"""What the modules of a chain return: :class:`LinkOutputs` finds it out before they run for a call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.environment import CallEnvironment
from madtp.calls.objects import is_object
from madtp.calls.saved_tensors import without_saved_tensors_hooks
from madtp.calls.structures import unflatten
from madtp.errors import MadtpError
from madtp.programs.cached_program import Unserved
from madtp.programs.originals import original_of
from madtp.sites.additions import Additions
from madtp.sites.preserved_state import trial_run

NOT_ONE = "{} returns {} tensors, of which one cannot go on by itself"
OTHER_SHAPE = "{} returns a tensor of shape {} for one of shape {}"


@dataclass(frozen=True)
class LinkOutput:
    """What a module of a chain returns for a kind of call: one tensor of the shape of the one that goes through, and constants.

    Attributes:
        spec: structure of what it returns.
        leaves: the leaves; None for the tensor.
        place: which leaf is the tensor.
        dtype: dtype of the tensor.
        device: device of the tensor.
    """

    spec: pytree.TreeSpec
    leaves: tuple[object, ...]
    place: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, result: object, hidden: Tensor, name: str) -> LinkOutput:
        """What is known of the result of a module.

        Args:
            result: what the module returned.
            hidden: the tensor in its call that goes through the chain.
            name: path of the module.

        Raises:
            Unserved: it is not one tensor of that shape.
        """
        leaves, spec = pytree.tree_flatten(result)
        tensors = [(at, leaf) for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(tensors) != 1 or any(is_object(leaf) for leaf in leaves):
            raise Unserved(NOT_ONE.format(name, len(tensors)))
        place, tensor = tensors[0]
        if tensor.shape != hidden.shape:
            raise Unserved(OTHER_SHAPE.format(name, tuple(tensor.shape), tuple(hidden.shape)))
        constants = tuple(None if at == place else leaf for at, leaf in enumerate(leaves))
        return cls(spec, constants, place, tensor.dtype, tensor.device)

    def holding(self, tensor: Tensor) -> object:
        """The result with this tensor."""
        return unflatten([tensor if at == self.place else leaf for at, leaf in enumerate(self.leaves)], self.spec)

    def hidden_in(self, result: object, name: str) -> Tensor:
        """The tensor in a result of the module.

        Raises:
            MadtpError: the result is another one than was expected.
        """
        leaves, spec = pytree.tree_flatten(result)
        tensor = leaves[self.place] if spec == self.spec else None
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.device) != (self.dtype, self.device):
            raise MadtpError(
                f"{name} returns something else than it did for an earlier call of the same kind, by something that its inputs "
                "do not show. Prune other parts only (towers), and please report the model."
            )
        return tensor


class LinkOutputs:
    """What the modules of a chain return. The first call of each kind is run aside to find it out.

    Attributes:
        additions: those of the pruned model.
        known: what is known, by number of the module and kind of call; see :func:`kind_of`.
    """

    def __init__(self, additions: Additions) -> None:
        """Know nothing yet."""
        self.additions = additions
        self.known: dict[tuple[int, Hashable], LinkOutput] = {}

    def found_out(self, name: str, module: nn.Module, call: Call, hidden: Tensor) -> tuple[Tensor, LinkOutput]:
        """Run a module so that nothing else sees it; returns what goes on of what it returned, and what is known of it.

        Args:
            name: path of the module.
            module: the module.
            call: a call with values.
            hidden: the tensor in the call that goes through the chain.

        Raises:
            Unserved: it returns something else than one tensor of the shape of ``hidden``.
        """
        copy = original_of(module, self.additions.own_hooks)
        trial = trial_run(copy, (call.args, call.kwargs))
        with torch.no_grad(), trial, without_saved_tensors_hooks(), self.additions.control.in_program():
            result = copy(*call.args, **call.kwargs)
        output = LinkOutput.of(result, hidden, name)
        return output.hidden_in(result, name), output


def kind_of(
    module: nn.Module, leaves: Sequence[object], structure: str, hidden: Tensor, environment: CallEnvironment
) -> Hashable:
    """Return what the form of a module's result depends on: structure and constants of its call, and modes.

    Args:
        module: the module.
        leaves: the leaves of the call.
        structure: their structure.
        hidden: the tensor among them that goes through the chain.
        environment: modes of torch around the call.
    """
    described = tuple(["*" if x is hidden else x.dtype if isinstance(x, Tensor) else repr(x) for x in leaves])
    training = tuple([one.training for one in module.modules()])
    return structure, described, training, environment.autocast, hidden.dtype, hidden.device
