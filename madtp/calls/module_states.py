"""What of a module tree a capture depends on: :class:`ModuleStates`. Every call asks."""

from __future__ import annotations

import operator
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from madtp.calls.compiling import is_compiling


class ModuleState(NamedTuple):
    """What of a module tree a capture depends on.

    Attributes:
        training: the training flag of each module.
        dtypes: the dtype of each parameter; models cast what they are given to that of their weights.
    """

    training: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]


class ModuleStates:
    """Tells the state of a module tree.

    It remembers the tree, as a walk through it would cost a small model a twentieth of a call, and walks again when a module
    has other children. While a compiler follows, dtypes are those of the last call.

    Args:
        model: the root of the tree.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._walk()

    def __call__(self) -> ModuleState:
        """The state now."""
        children = self._present()
        if len(children) != len(self._children) or not all(map(operator.is_, children, self._children)):
            self._walk()
        if not is_compiling():
            parameters = chain.from_iterable(module._parameters.values() for module in self._modules)
            self._dtypes = tuple([one.dtype for one in parameters if one is not None])
        return ModuleState(tuple([module.training for module in self._modules]), self._dtypes)

    def _present(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(module._modules.values() for module in self._modules))

    def _walk(self) -> None:
        self._modules = list(self._model.modules())
        self._children = self._present()
