"""Copies of modules that share their parameters: :func:`share`.

A rewritten model must not change the original, yet it trains the same parameters. So it gets module objects of its own around
the tensors of the original. Models also reach their modules past the tree, by lists, bound methods and closures: these lead to
the copies, too, or a trace would meet the original modules.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

# What torch keeps in a module under these names, the copy has of its own.
OWN = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def share(module: nn.Module, prepare: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Return a copy of a module and its submodules: new module objects with the same parameters and buffers.

    Training flags, hooks and submodules can be changed in the copy alone. A module that is used twice stays one module. What
    holds modules of the tree (lists, tuples, dicts and the like, bound methods, partial functions, closures) holds the copies.

    Args:
        module: the module to copy.
        prepare: called with each copy before its children are copied; it may change what the copy holds.
    """
    copies: dict[int, nn.Module] = {}
    copy = _copied(module, copies, prepare)
    rebinding = _Rebinding(copies)
    for one in copies.values():
        for name, value in one.__dict__.items():
            if name not in OWN:
                one.__dict__[name] = rebinding(value)
    return copy


def _copied(module: nn.Module, copies: dict[int, nn.Module], prepare: Callable[[nn.Module], None] | None) -> nn.Module:
    """The copy of a module; ``copies`` holds those made so far, by ``id`` of the original."""
    if id(module) in copies:
        return copies[id(module)]
    copy = object.__new__(module.__class__)  # a constructor of its own may make something else
    copies[id(module)] = copy
    copy.__dict__ = dict(module.__dict__)
    for name, value in module.__dict__.items():
        hooks = name.endswith("_hooks") and isinstance(value, dict)
        if hooks or name in OWN:
            copy.__dict__[name] = value.copy()
    if prepare is not None:
        prepare(copy)
    copy.__dict__["_modules"] = {
        name: None if child is None else _copied(child, copies, prepare) for name, child in copy._modules.items()
    }
    return copy


class _Rebinding:
    """Makes values that hold modules hold their copies; other values stay as they are.

    Args:
        copies: the copies by ``id`` of the original.
    """

    def __init__(self, copies: dict[int, nn.Module]) -> None:
        self._copies = copies
        # Each value is looked at once, so that what two modules share stays shared. The value is kept with what it became, as
        # ids of values that are gone are used again.
        self._known: dict[int, tuple[object, object]] = {}
        self._cells: dict[int, tuple[CellType, CellType]] = {}

    def __call__(self, value: Any) -> Any:
        """The value, or one like it that holds copies."""
        if isinstance(value, nn.Module):
            return self._copies.get(id(value), value)
        make = next((make for kind, make in _KINDS.items() if type(value) is kind), None)
        if make is None:
            return value
        if id(value) not in self._known:
            self._known[id(value)] = (value, value)  # what holds itself is left as it is
            self._known[id(value)] = (value, make(self, value))
        return self._known[id(value)][1]

    def items(self, value: Any) -> Any:
        """A sequence or a set."""
        items = [self(item) for item in value]
        if _same(items, value):
            return value
        return deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)

    def mapping(self, value: Any) -> Any:
        """A mapping; its keys stay."""
        items = [self(item) for item in value.values()]
        if _same(items, value.values()):
            return value
        changed = value.copy()
        changed.update(zip(value, items, strict=True))
        return changed

    def method(self, value: MethodType) -> MethodType:
        """A bound method."""
        owner = self(value.__self__)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)

    def partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        """A partial function."""
        function, args, keywords = self(value.func), self(value.args), self(value.keywords)
        if function is value.func and args is value.args and keywords is value.keywords:
            return value
        return functools.partial(function, *args, **keywords)

    def function(self, value: FunctionType) -> FunctionType:
        """A function with a closure or with defaults."""
        before = value.__closure__ or ()
        closure = [self._cell(cell) for cell in before]
        defaults, keywords = self(value.__defaults__), self(value.__kwdefaults__)
        if _same(closure, before) and defaults is value.__defaults__ and keywords is value.__kwdefaults__:
            return value
        changed = FunctionType(value.__code__, value.__globals__, value.__name__, defaults, tuple(closure))
        functools.update_wrapper(changed, value)
        changed.__kwdefaults__ = keywords
        return changed

    def _cell(self, cell: CellType) -> CellType:
        """A cell of a closure; what several closures share stays shared."""
        try:
            content = cell.cell_contents
        except ValueError:  # it is empty
            return cell
        if id(cell) not in self._cells:
            changed = self(content)
            self._cells[id(cell)] = (cell, cell if changed is content else CellType(changed))
        return self._cells[id(cell)][1]


_KINDS: dict[type, Callable[[_Rebinding, Any], Any]] = {
    **dict.fromkeys((list, tuple, set, frozenset, deque), _Rebinding.items),
    **dict.fromkeys((dict, OrderedDict, defaultdict), _Rebinding.mapping),
    MethodType: _Rebinding.method,
    functools.partial: _Rebinding.partial,
    FunctionType: _Rebinding.function,
}


def _same(items: list[Any], others: Any) -> bool:
    return all(one is other for one, other in zip(items, others, strict=True))
