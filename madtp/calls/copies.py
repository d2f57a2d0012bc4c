"""Copies of modules that share their parameters: :func:`share`.

A rewritten model must not change the original, yet it trains the same parameters. So it gets module objects of its own around
the tensors of the original. Models also reach their modules past the tree, by lists, bound methods and closures: these lead to
the copies, too, or a trace would meet the original modules.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from madtp.calls.plain_values import slot_names

DEPTH = 3
"""How deep objects of the host's own classes lie in each other that are looked at."""
CLOSED = (nn.Module, Tensor, type, ModuleType, BuiltinFunctionType)
LIBRARIES = ("builtins", "torch", "madtp", "numpy", "threading", "logging", "_thread")
# What torch keeps in a module under these names, the copy has of its own.
OWN = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def share(module: nn.Module, prepare: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Return a copy of a module and its submodules: new module objects with the same parameters and buffers.

    Training flags, hooks and submodules can be changed in the copy alone. A module that is used twice stays one module. What
    holds modules of the tree (lists, tuples, dicts and the like, bound methods, partial functions, closures, weak references,
    objects of the host's own classes) holds the copies.

    Args:
        module: the module to copy.
        prepare: called with each copy before its children are copied; it may change what the copy holds.
    """
    copies: dict[int, nn.Module] = {}
    shared = _copied(module, copies, prepare)
    rebinding = _Rebinding(copies)
    for one in copies.values():
        for name, value in one.__dict__.items():
            if name not in OWN:
                one.__dict__[name] = rebinding(value)
    return shared


def _copied(module: nn.Module, copies: dict[int, nn.Module], prepare: Callable[[nn.Module], None] | None) -> nn.Module:
    """The copy of a module; ``copies`` holds those made so far, by ``id`` of the original."""
    if id(module) in copies:
        return copies[id(module)]
    own = object.__new__(module.__class__)  # a constructor of its own may make something else
    copies[id(module)] = own
    own.__dict__ = dict(module.__dict__)
    for name, value in module.__dict__.items():
        hooks = name.endswith("_hooks") and isinstance(value, dict)
        if hooks or name in OWN:
            own.__dict__[name] = value.copy()
    if prepare is not None:
        prepare(own)
    own.__dict__["_modules"] = {
        name: None if child is None else _copied(child, copies, prepare) for name, child in own._modules.items()
    }
    return own


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
        self._depth = 0

    def __call__(self, value: Any) -> Any:
        """The value, or one like it that holds copies."""
        if isinstance(value, nn.Module):
            return self._copies.get(id(value), value)
        make = next((make for kind, make in _KINDS.items() if type(value) is kind), None)
        if make is None:
            if self._depth == DEPTH or not _may_hold_modules(value):
                return value
            make = _Rebinding.object
        if id(value) not in self._known:
            self._known[id(value)] = (value, value)  # what holds itself is left as it is
            self._known[id(value)] = (value, make(self, value))
        return self._known[id(value)][1]

    def object(self, value: Any) -> Any:
        """An object of the host's own, such as a namespace or a list of a class of its own."""
        self._depth += 1
        try:
            if isinstance(value, tuple):
                items = [self(one) for one in value]
                return value if _same(items, value) or not hasattr(value, "_fields") else type(value)(*items)
            names = [name for name in _attributes(value) if hasattr(value, name)]
            before = [getattr(value, name) for name in names]
            attributes = [self(one) for one in before]
            entries = self._entries(value)
        finally:
            self._depth -= 1
        if _same(attributes, before) and entries is None:
            return value
        try:
            changed = copy.copy(value)
            for name, one in zip(names, attributes, strict=True):
                object.__setattr__(changed, name, one)  # past what a frozen class refuses
        except Exception:  # it lets itself not be copied
            return value
        if isinstance(entries, dict):
            changed.update(entries)
        elif entries is not None:
            changed[:] = entries
        return changed

    def _entries(self, value: Any) -> list[Any] | dict[Any, Any] | None:
        """The entries of a list or dict of a class of its own; None if they stay."""
        if isinstance(value, list):
            items = [self(one) for one in value]
            return None if _same(items, value) else items
        if isinstance(value, dict):
            found = {key: self(one) for key, one in value.items()}
            return None if _same(list(found.values()), value.values()) else found
        return None

    def reference(self, value: weakref.ReferenceType[Any]) -> weakref.ReferenceType[Any]:
        """A weak reference."""
        owner = value()
        changed = self(owner)
        return value if changed is owner else weakref.ref(changed)

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
    weakref.ReferenceType: _Rebinding.reference,
}


def _may_hold_modules(value: object) -> bool:
    kind = type(value)
    return not isinstance(value, CLOSED) and kind.__module__.partition(".")[0] not in LIBRARIES


def _attributes(value: object) -> list[str]:
    """The names of what an object keeps in itself."""
    return [*getattr(value, "__dict__", {}), *slot_names(value)]


def _same(items: list[Any], others: Any) -> bool:
    return all(one is other for one, other in zip(items, others, strict=True))
