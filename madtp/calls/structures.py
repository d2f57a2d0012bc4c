"""Nests of containers put together again: :func:`unflatten`, the inverse of a pytree flatten that keeps the order of names.

Output classes may be dictionaries as well, whose ``unflatten`` goes through their constructor: names that the model had set
one after the other come back in the order in which the class declares them, and what reads outputs by position finds others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils import _pytree as pytree


def unflatten(leaves: Iterable[Any], spec: pytree.TreeSpec) -> Any:
    """The structure of ``spec`` with these leaves; ordered dictionaries have their names in its order."""
    value = pytree.tree_unflatten(leaves, spec)
    _reorder(value, spec)
    return value


def _reorder(value: Any, spec: pytree.TreeSpec) -> None:
    names = spec.context
    if isinstance(value, Mapping) and isinstance(names, list) and set(names) == set(value):
        if isinstance(value, OrderedDict) and list(value) != names:
            for name in names:
                value.move_to_end(name)
        own: Sequence[Any] = [value[name] for name in names]
    elif isinstance(value, list | tuple):
        own = value
    else:
        return
    for one, inner in zip(own, spec.children(), strict=True):
        _reorder(one, inner)
