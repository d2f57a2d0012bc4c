"""Copies of module trees that share parameters.

Start at :func:`share`. A rewritten model must not change the original, yet trains the same parameters: it gets module
objects of its own around the original's tensors.
"""

from __future__ import annotations

from torch import nn


def share(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy of a module tree: new module objects, the same parameters and buffers.

    Training flags, hooks and child lists of the copy are its own. Modules used twice stay one module.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    copy = module.__class__.__new__(module.__class__)
    memo[id(module)] = copy
    copy.__dict__ = dict(module.__dict__)
    for name, value in module.__dict__.items():
        hooks = name.endswith("_hooks") and isinstance(value, dict)
        if hooks or name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            copy.__dict__[name] = value.copy()
    copy.__dict__["_modules"] = {
        name: None if child is None else share(child, memo) for name, child in module._modules.items()
    }
    return copy
