"""The base of what takes the place of a module's forward: :class:`ReplacedForward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from madtp.sites.additions import PREFIX, Additions

HOST_CLASS = "__madtp_host__"
"""Attribute of a pruned model's class that names the class of the host."""


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward that a module had before the rewrite: the host's, of a pruned model."""
    host_class = getattr(type(module), HOST_CLASS, None)
    if host_class is None:
        return module.forward
    additions = module._modules[PREFIX]
    assert isinstance(additions, Additions)
    bound: Callable[..., Any] = (
        host_class.forward.__get__(module) if additions.own_forward is None else additions.own_forward
    )
    return bound


class ReplacedForward:
    """Takes the place of a module's forward, and has its signature.

    Attributes:
        module: the module whose forward is replaced.
        original: the module's own forward.
        attribute: the same where it is an attribute of the module, and not a method of its class; else None.
        parameters: its signature.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = original_forward(module)
        self.attribute = None if inspect.ismethod(self.original) and self.original.__self__ is module else self.original
        self.__wrapped__ = self.original
        self.parameters = inspect.signature(self.original)
