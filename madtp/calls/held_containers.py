"""What a module holds in its attributes and may change as it runs: :func:`containers_in`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Container: TypeAlias = dict[Any, Any] | list[Any] | set[Any] | deque[Any]

DEPTH = 3
"""How deep containers lie in containers that are looked at."""
LARGEST = 1000
"""Number of entries of a container beyond which these are not looked at."""
CLOSED = (nn.Module, Tensor, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, torch.dtype, torch.device)


def containers_in(values: Iterable[object], seen: set[int], depth: int = DEPTH) -> Iterator[Container]:
    """Yield lists, dicts, sets and queues among values and inside of them, and the attributes of plain objects as dicts.

    Args:
        values: the attributes of a module, for instance.
        seen: the ids of containers that were yielded already; grows.
        depth: how deep to look.
    """
    for value in values:
        if value is None or isinstance(value, (bool, int, float, str, bytes, *CLOSED)):
            continue
        if isinstance(value, tuple):
            if depth:
                yield from containers_in(value, seen, depth - 1)
            continue
        own: Container | None = value if isinstance(value, (dict, list, set, deque)) else _attributes_of(value)
        if own is None or id(own) in seen:
            continue
        seen.add(id(own))
        yield own
        if depth and len(own) <= LARGEST:
            yield from containers_in(list(own.values()) if isinstance(own, dict) else list(own), seen, depth - 1)


def _attributes_of(value: object) -> dict[str, Any] | None:
    found = getattr(value, "__dict__", None)
    ours = type(value).__module__.partition(".")[0] in ("madtp", "torch")
    return found if type(found) is dict and not ours else None
