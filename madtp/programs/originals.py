"""Modules as they were before the rewrite: :func:`original_of`, to trace them, and :func:`unwrapped`, to keep them."""

from __future__ import annotations

from torch import nn

from madtp.calls.copies import share
from madtp.calls.hooks import OwnHooks, drop_hooks
from madtp.programs.replaced_forward import HOST_CLASS, ReplacedForward
from madtp.sites.additions import PREFIX, Additions


def original_of(module: nn.Module, own: OwnHooks) -> nn.Module:
    """Return a copy of a module as it was before the rewrite, for tracing.

    It has its own class and forwards again, no additions, no hooks but its own, and the same parameters.

    Args:
        module: a pruned model, or a module of one. It may run in other threads meanwhile.
        own: the model's own hooks.
    """

    def restore(copy: nn.Module) -> None:
        drop_hooks(copy, own)
        _restore(copy)

    return share(module, restore)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return such a copy that has all its hooks."""
    return share(module, _restore)


def _restore(copy: nn.Module) -> None:
    forward = copy.__dict__.get("forward")
    host_class = getattr(type(copy), HOST_CLASS, None)
    if host_class is not None:
        additions = copy._modules.pop(PREFIX)
        assert isinstance(additions, Additions)
        copy.__class__ = host_class
        forward = additions.own_forward
    if isinstance(forward, ReplacedForward):
        forward = forward.attribute
    if forward is not None:
        copy.__dict__["forward"] = forward
    else:
        copy.__dict__.pop("forward", None)
