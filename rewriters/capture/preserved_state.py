"""Restore a model after tracing or a trial: discard what its modules stored meanwhile, such as a cached mask.

Start at :func:`preserved_attributes`. It would hold tensors without values, which later calls would read.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Hooks lie in an OrderedDict.
CONTAINERS = (dict, list, set, OrderedDict)


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules on leaving, the contents of their plain containers included."""
    before = [(vars(module), _contents(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for present, (values, contents) in before:
            _refill(present, values)
            for container, content in contents:
                _refill(container, content)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Restore what a run of a model writes into its buffers (running statistics, in training mode)."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _contents(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The attributes of a module, and each plain container among them with a copy of what it holds."""
    containers = [value for value in attributes.values() if type(value) in CONTAINERS]
    return dict(attributes), [(container, copy.copy(container)) for container in containers]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
