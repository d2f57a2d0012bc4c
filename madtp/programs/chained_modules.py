"""Modules that a host calls one after the other, as one module: :class:`ChainedModules`, and :func:`chained_call` for calls.

Such a host has no submodule that runs all of its blocks. This one does. Its forward takes the tensor that goes through them,
all that they are given besides, and a description of how each is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call

HIDDEN = "<what the module before returned>"
GIVEN = "<given {}>"


@dataclass(frozen=True)
class Chain:
    """Modules that are called one after the other, each with a tensor that the one before returned.

    Attributes:
        names: their module paths.
        start: place in the call of the first one of the tensor that goes through the chain.
    """

    names: tuple[str, ...]
    start: str

    def __str__(self) -> str:
        return f"{self.names[0]} to {self.names[-1]}"


@dataclass(frozen=True)
class LinkCall:
    """A call of a chained module.

    Attributes:
        call: the call.
        hidden: the tensor in it that the module before returned; of the first, the one that goes through the chain.
    """

    call: Call
    hidden: Tensor


class ChainedModules(nn.Module):
    """Modules of a host under their own paths, with a forward that calls one after the other."""

    def __init__(self, host: nn.Module, names: Sequence[str]) -> None:
        """Make it of the modules at paths ``names`` of ``host``, which it shares."""
        super().__init__()
        self.names = tuple(names)
        self.training = False
        for name in names:
            *holders, last = name.split(".")
            place: nn.Module = self
            for holder in holders:
                if holder not in place._modules:
                    place.add_module(holder, nn.Module().eval())
                place = place.get_submodule(holder)
            place.add_module(last, host.get_submodule(name))

    def forward(self, hidden: Tensor, given: list[Tensor], calls: list[Any], places: list[int]) -> object:
        """Call one module after the other.

        Args:
            hidden: what the first is given of the tensor that goes through all.
            given: all other tensors that they are given, each once.
            calls: the arguments ``(args, kwargs)`` of each, with names in place of tensors.
            places: for each but the last, which leaf of what it returns goes on.

        Returns:
            What the last returns.
        """
        return called_in_turn([self.get_submodule(name) for name in self.names], hidden, given, calls, places)


def called_in_turn(
    forwards: Sequence[Callable[..., object]],
    hidden: Tensor,
    given: Sequence[Tensor],
    calls: Sequence[Any],
    places: Sequence[int],
) -> object:
    """Call one function after the other, as :meth:`ChainedModules.forward` does; returns what the last returns."""
    result: object = None
    for number, (forward, call) in enumerate(zip(forwards, calls, strict=True)):
        args, kwargs = filled(call, hidden, given)
        result = forward(*args, **kwargs)
        if number < len(places):
            hidden = pytree.tree_leaves(result)[places[number]]
    return result


def chained_call(calls: Sequence[LinkCall], places: Sequence[int]) -> Call:
    """Return the call of :class:`ChainedModules` for calls of its modules.

    Args:
        calls: the calls, in order.
        places: see :meth:`ChainedModules.forward`.
    """
    given: dict[int, Tensor] = {}
    described = []
    for one in calls:
        leaves, spec = one.call.flat()
        described.append(pytree.tree_unflatten([_name(leaf, one.hidden, given) for leaf in leaves], spec))
    further = {"given": list(given.values()), "calls": described, "places": list(places)}
    return Call((), {"hidden": calls[0].hidden, **further})


def _name(leaf: object, hidden: Tensor, given: dict[int, Tensor]) -> object:
    """What stands for a leaf in the description of a call; a tensor that is new becomes one of those ``given``."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf is hidden:
        return HIDDEN
    given.setdefault(id(leaf), leaf)
    return GIVEN.format(list(given).index(id(leaf)))


def filled(call: object, hidden: Tensor, given: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of one module: ``call``, with tensors in place of their names."""
    tensors = {HIDDEN: hidden, **{GIVEN.format(number): tensor for number, tensor in enumerate(given)}}
    args, kwargs = pytree.tree_map(lambda leaf: tensors.get(leaf, leaf) if isinstance(leaf, str) else leaf, call)
    return args, kwargs
