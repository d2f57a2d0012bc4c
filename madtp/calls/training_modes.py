"""Which modules are in training mode: :class:`TrainingModes`. Every call asks."""

from __future__ import annotations

from itertools import chain

from torch import nn


class TrainingModes:
    """Tells whether each module of a tree is in training mode.

    It remembers the tree, as a walk through it would cost a small model a twentieth of a call, and walks again when a module
    has other children.

    Args:
        model: the root of the tree.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []
        self._walk()

    def __call__(self) -> tuple[bool, ...]:
        """The training flag of each module, in a fixed order."""
        if self._children != self._present():
            self._walk()
        return tuple([module.training for module in self._modules])

    def _present(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(module._modules.values() for module in self._modules))

    def _walk(self) -> None:
        self._modules = list(self._model.modules())
        self._children = self._present()
