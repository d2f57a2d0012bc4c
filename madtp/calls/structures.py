"""Nested containers put together again: :func:`unflatten`, an inverse of pytree's flatten that keeps the order of names.

Output classes may be ordered dictionaries whose pytree ``unflatten`` goes through their constructor. Names that the model set
in an order of its own would come back in the order in which the class declares them, and code that reads outputs by position
would find others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from torch.utils import _pytree as pytree


def unflatten(leaves: Iterable[object], spec: pytree.TreeSpec) -> object:
    """Return the structure ``spec`` with these leaves; ordered dictionaries have their names in its order."""
    value: object = pytree.tree_unflatten(leaves, spec)
    _reorder(value, spec)
    return value


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
