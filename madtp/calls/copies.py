"""Copies of modules that share their parameters: :func:`share`.

A rewritten model must not change the original, yet it trains the same parameters. So it gets module objects of its own around
the tensors of the original.
"""

from __future__ import annotations

from torch import nn


def share(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """Return a copy of a module and its submodules: new module objects with the same parameters and buffers.

    Training flags, hooks and submodules can be changed in the copy alone. A module that is used twice stays one module.

    Args:
        module: the module to copy.
        memo: copies made so far, by ``id`` of the original.
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
