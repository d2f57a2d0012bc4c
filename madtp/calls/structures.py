"""Nested containers put together again, and the order of the names in them.

Output classes may be ordered dictionaries whose pytree ``unflatten`` goes through their constructor. Names that the model set
in an order of its own come back in the order in which the class declares them. :func:`unflatten` keeps the order, for code that
reads outputs by position; :func:`in_declared_order` gives it up, so that leaves stand where a capture has found them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

Container = TypeVar("Container")


def unflatten(leaves: Iterable[object], spec: pytree.TreeSpec) -> object:
    """Return the structure ``spec`` with these leaves; ordered dictionaries have their names in its order."""
    value: object = pytree.tree_unflatten(leaves, spec)
    _reorder(value, spec)
    return value


def in_declared_order(value: Container) -> Container:
    """Return a copy of a container in which names have the order that their classes give them; a leaf as it is."""
    if isinstance(value, Tensor | str | int | float | None):  # most arguments
        return value
    leaves, spec = pytree.tree_flatten(value)
    if spec.is_leaf():
        return value
    try:
        rebuilt: Container = pytree.tree_unflatten(leaves, spec)
    except Exception:  # a class that takes less than it holds
        return value
    return rebuilt


def _reorder(value: object, spec: pytree.TreeSpec) -> None:
    names = spec.context
    inner: Sequence[object]
    if isinstance(value, Mapping) and isinstance(names, list) and set(names) == set(value):
        if isinstance(value, OrderedDict) and list(value) != names:
            for name in names:
                value.move_to_end(name)
        inner = [value[name] for name in names]
    elif isinstance(value, list | tuple):
        inner = value
    else:
        return
    for one, inner_spec in zip(inner, spec.children(), strict=True):
        _reorder(one, inner_spec)
