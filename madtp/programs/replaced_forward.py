"""The base of what takes the place of a module's forward: :class:`ReplacedForward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


class ReplacedForward:
    """Takes the place of ``module.forward``, and has its signature.

    Attributes:
        module: the module whose forward is replaced.
        original: the module's own forward.
        parameters: its signature.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original: Callable[..., object] = module.forward
        self.__wrapped__ = self.original
        self.parameters = inspect.signature(self.original)


@contextmanager
def original_forwards(root: nn.Module) -> Iterator[None]:
    """Restore the replaced forwards of a tree's modules inside the block."""
    changed = [module for module in root.modules() if isinstance(module.__dict__.get("forward"), ReplacedForward)]
    replacements = [module.__dict__.pop("forward") for module in changed]
    try:
        yield
    finally:
        for module, forward in zip(changed, replacements, strict=True):
            module.__dict__["forward"] = forward
