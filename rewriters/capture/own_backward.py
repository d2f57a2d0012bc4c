"""Functions with a backward pass of their own, while a model is traced: :func:`following_functions`.

A trace holds what the forward pass computes. Reentrant checkpoints only compute it twice, so their content is traced. Of any
other such function the backward pass is lost, and so are hooks on tensors, which may change gradients; so they are told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

LIBRARY = "torch."
APPLY = "apply"
HOOK = "register_hook"


@contextmanager
def following_functions() -> Iterator[list[str]]:
    """Inside the block, follow the functions that this thread applies. One thread at a time can be inside.

    Yields:
        The names of those whose backward pass a trace would lose; it grows.
    """
    function, thread, found = torch.autograd.Function, threading.get_ident(), list[str]()
    # Not bound to a class yet: a function is applied by its own class.
    unbound = next(vars(kind)[APPLY] for kind in function.__mro__ if APPLY in vars(kind))
    hook: Callable[..., Any] = torch.Tensor.register_hook

    def note(name: str) -> None:
        if threading.get_ident() == thread and name not in found:
            found.append(name)

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction and threading.get_ident() == thread:
            inside, _, *inputs = args
            return inside(*inputs)
        return unbound.__get__(None, cls)(*args, **kwargs)

    def made(context: Any, *args: Any, **kwargs: Any) -> None:
        applied = type(context)._forward_cls
        if not f"{applied.__module__}.".startswith(LIBRARY):
            note(applied.__name__)

    def register_hook(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        note("Tensor.register_hook")
        return hook(tensor, *args, **kwargs)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(function, APPLY, classmethod(apply)))
        patches.enter_context(mock.patch.object(torch.Tensor, HOOK, register_hook))
        # Every application makes a context, also of an `apply` that was kept under another name.
        patches.enter_context(mock.patch.object(BackwardCFunction, "__init__", made))
        yield found
