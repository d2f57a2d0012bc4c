"""Quantised weights, which hide the arithmetic of a model: :func:`quantised_modules`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def quantised_modules(model: nn.Module) -> list[str]:
    """Return the modules with quantised weights, as ``path (class)``: packed objects, or tensors of a class of their own."""
    return [
        f"{path} ({kind})" for path, module in model.named_modules() if (kind := _quantised_kind(module)) is not None
    ]


def quantised_remark(model: nn.Module) -> str:
    """Return what to say of a model with quantised weights that cannot be rewritten; nothing of any other."""
    found = quantised_modules(model)
    if not found:
        return ""
    return (
        f" It holds quantised weights ({found[0]}{', ...' if len(found) > 1 else ''}), whose operations are not followed: "
        "rewrite the model before it is quantised, and quantise the pruned model."
    )


def _quantised_kind(module: nn.Module) -> str | None:
    if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
        return type(module).__name__
    own = (*module._parameters.values(), *module._buffers.values())
    return next((type(x.data).__name__ for x in own if x is not None and type(x.data) is not Tensor), None)
