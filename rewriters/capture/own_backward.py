"""Functions with a backward pass of their own, while a model is traced: :func:`following_functions`.

A trace holds what the forward pass computes. Reentrant checkpoints only compute it twice, so their content is traced. Of any
other such function the backward pass is lost, so it is told.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

LIBRARY = "torch."
APPLY = "apply"


@contextmanager
def following_functions() -> Iterator[list[str]]:
    """Inside the block, follow the functions that this thread applies. One thread at a time can be inside.

    Yields:
        The names of those whose backward pass a trace would lose; it grows.
    """
    function, thread, found = torch.autograd.Function, threading.get_ident(), list[str]()
    own = vars(function).get(APPLY)
    # Not bound to a class yet: a function is applied by its own class.
    unbound = next(vars(kind)[APPLY] for kind in function.__mro__ if APPLY in vars(kind))

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            if cls is CheckpointFunction:
                inside, _, *inputs = args
                return inside(*inputs)
            if not f"{cls.__module__}.".startswith(LIBRARY) and cls.__name__ not in found:
                found.append(cls.__name__)
        return unbound.__get__(None, cls)(*args, **kwargs)

    setattr(function, APPLY, classmethod(apply))
    try:
        yield found
    finally:
        if own is None:
            delattr(function, APPLY)
        else:
            setattr(function, APPLY, own)
