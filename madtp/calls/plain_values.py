"""Plain data in the attributes of modules: start at :func:`configuration_of` and :func:`comparable`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 4
"""How deep configurations lie in configurations that are looked at."""
PLAIN = frozenset((bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device))
NO_CONFIGURATION = (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType)
NO_CONFIGURATIONS_OF = ("builtins", "torch", "madtp")


def configuration_of(value: object, depth: int = DEPTH) -> Mapping[str, Any] | None:
    """Return the attributes of an object that is plain data, or holds such objects; None of any other."""
    values = _entries(value)
    if not values:
        return None
    inside = values.values()
    leads = any(type(one) in PLAIN for one in inside)
    return values if leads or (depth and any(configuration_of(one, depth - 1) is not None for one in inside)) else None


def _entries(value: object) -> Mapping[str, Any] | None:
    if isinstance(value, dict):
        return value if all(type(key) is str for key in value) else None
    if isinstance(value, NO_CONFIGURATION) or type(value).__module__.partition(".")[0] in NO_CONFIGURATIONS_OF:
        return None
    values = getattr(value, "__dict__", None)
    if type(values) is dict and values:
        return values
    slots = slot_names(value)
    return _Slots(value, slots) if slots else None


def slot_names(value: object) -> tuple[str, ...]:
    """Return the names of the attributes that an object keeps in slots."""
    slots: list[str | Iterable[str]] = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for one in slots for name in ((one,) if isinstance(one, str) else one)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


class _Slots(Mapping[str, Any]):
    """The attributes of an object that keeps them in slots; those that were never set are None."""

    def __init__(self, value: object, names: tuple[str, ...]) -> None:
        self._value, self._names = value, names

    def __getitem__(self, name: str) -> Any:
        return getattr(self._value, name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Itself:
    """Stands for a value that is compared by identity. It keeps the value, as ids of values that are gone are used again."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def comparable(value: object) -> object:
    """Return a value that can be compared: of containers of plain values these; anything else is like itself alone."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, nn.Module) or (isinstance(value, dict) and configuration_of(value) is not None):
        return type(value)  # looked at by themselves
    found = _content(value)
    return _Itself(value) if found is None else found


def _content(value: object, depth: int = DEPTH) -> tuple[object, ...] | None:
    """Kind and content of a list, tuple or dict, as far down as these go; None if it holds anything but plain values."""
    if isinstance(value, (list, tuple)):
        items: list[object] = list(value)
    elif isinstance(value, dict):
        items = [*value.keys(), *value.values()]
    else:
        return None
    parts = [one if type(one) in PLAIN else _content(one, depth - 1) if depth else None for one in items]
    if any(part is None and one is not None for part, one in zip(parts, items, strict=True)):
        return None
    return type(value), *parts
