"""What of a module tree a capture depends on: :class:`ModuleStates`. Every call asks.

Python reads attributes of modules and of their configurations while it is traced, and none of that is in the graph. So a
switch that is set after the rewrite belongs to the kind of a call, as its shapes do.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from madtp.calls.compiling import is_compiling

# What torch keeps in every module.
UNWATCHED = frozenset((*vars(nn.Module()), "_compiled_call_impl"))
SHARDING = ("__composable_api_state", "_fsdp_", "_is_fsdp_")
"""How names begin that torch gives its marks on modules whose parameters are sharded."""
DEPTH = 2
"""How deep configurations lie in configurations that are looked at."""
PLAIN = frozenset((bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device))
# Modules that stand for one operation, without a mode.
LEAVES = frozenset(
    (
        nn.Linear,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.Embedding,
        nn.GELU,
        nn.ReLU,
        nn.SiLU,
        nn.Tanh,
    )
)
NO_CONFIGURATION = (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType)
NO_CONFIGURATIONS_OF = ("builtins", "torch", "madtp")
Reader = Callable[[Mapping[str, Any]], Any]


class ModuleState(NamedTuple):
    """What of a module tree a capture depends on.

    Attributes:
        training: the training flag of each module, where it may matter.
        dtypes: the dtype of each parameter; models cast what they are given to that of their weights.
        attributes: the attributes of modules that are more than one operation, and of configurations.
    """

    training: tuple[bool, ...]
    dtypes: tuple[torch.dtype | None, ...]
    attributes: tuple[object, ...] = ()


class _Namespace(NamedTuple):
    """Attributes that are watched.

    Attributes:
        values: holds them.
        length: number of its entries when it was looked at.
        names: the names of those that are watched.
        read: takes their values.
    """

    values: Mapping[str, Any]
    length: int
    names: tuple[str, ...]
    read: Reader


class _Tree(NamedTuple):
    """A module tree as it was found.

    Attributes:
        inner: the modules that are no leaves.
        children: the children of these.
        leaves: modules that stand for one operation, with the dtype of their first parameter.
        namespaces: the attributes that are watched.
        token: another object for every walk.
    """

    inner: list[nn.Module]
    children: list[nn.Module | None]
    leaves: list[tuple[nn.Module, torch.dtype | None]]
    namespaces: list[_Namespace]
    token: object

    def is_outdated(self) -> bool:
        """Whether a module has other children or attributes than then."""
        if not _same_objects(_children(self.inner), self.children):
            return True
        return any(len(one.values) != one.length for one in self.namespaces)


class ModuleStates:
    """Tells the state of a module tree.

    It remembers the tree, as a walk through it would cost a small model a twentieth of a call, and walks again when a module
    has other children or attributes. Leaves stand for one operation, which programs call where it lies: what replaces them
    later is called as they were. While a compiler follows, dtypes and attributes are those of the
    last call.

    Args:
        model: the root of the tree.
        without: name of a child of the root that is left out.
    """

    def __init__(self, model: nn.Module, without: str = "") -> None:
        self._model, self._without = model, without
        self._leaves = frozenset(path for path, module in self._named_modules() if _is_leaf(module))
        self._ignored: frozenset[str] = frozenset()
        # Of the first parameter of each leaf. What takes a leaf's place later may have none, or others.
        self._leaf_dtypes: dict[str, torch.dtype | None] = {}
        self._tree: _Tree | None = self._walked()
        self._last: tuple[list[object], tuple[object, ...]] = ([], ())
        self._dtypes: tuple[torch.dtype | None, ...] = ()

    def __deepcopy__(self, memo: dict[int, object]) -> ModuleStates:
        # The copies of the modules are not complete yet, so the first call walks through them.
        fresh = copy.copy(self)
        memo[id(self)] = fresh
        fresh._leaf_dtypes = dict(self._leaf_dtypes)
        fresh._model, fresh._tree, fresh._last = copy.deepcopy(self._model, memo), None, ([], ())
        return fresh

    def __call__(self) -> ModuleState:
        """The state now."""
        tree = self._tree
        if tree is None or (not is_compiling() and tree.is_outdated()):
            tree = self._tree = self._walked()
        if not is_compiling():
            values = _values(tree)
            if _other_objects(self._last[0], values):
                tree = self._tree = self._walked()
                values = _values(tree)
            self._last = self._compared(values)
            self._dtypes = _dtypes(tree)
        return ModuleState(tuple([module.training for module in tree.inner]), self._dtypes, self._last[1])

    @property
    def tree(self) -> object:
        """Stands for the tree as it was walked last: another object after every walk."""
        return None if self._tree is None else self._tree.token

    def ignore_differences(self, other: ModuleState) -> dict[int, str]:
        """Leave attributes out from now on in which ``other``, a state of this tree, differs from now.

        Returns:
            Their names, by their place in ``other.attributes``.
        """
        now = self().attributes
        assert self._tree is not None
        names = [f"{number}.{name}" for number, one in enumerate(self._tree.namespaces) for name in one.names]
        if not len(names) == len(now) == len(other.attributes):
            return {}
        pairs = enumerate(zip(now, other.attributes, strict=True))
        found = {at: names[at] for at, (own, its) in pairs if own != its}
        self._ignored |= frozenset(found.values())
        self._tree = self._walked()
        return {at: name.partition(".")[2] for at, name in found.items()}

    def _compared(self, values: list[object]) -> tuple[list[object], tuple[object, ...]]:
        """The attributes as they are, and as they are compared."""
        if _same_objects(values, self._last[0]):
            return self._last
        return values, tuple([_plain(value) for value in values])

    def _named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self._model.named_modules():
            if not (self._without and path.partition(".")[0] == self._without):
                yield path, module

    def _walked(self) -> _Tree:
        inside = tuple(f"{path}." for path in self._leaves)
        named = [(path, module) for path, module in self._named_modules() if not path.startswith(inside)]
        inner = [module for path, module in named if path not in self._leaves]
        leaves = [(path, module) for path, module in named if path in self._leaves]
        for path, module in leaves:
            self._leaf_dtypes[path] = _dtype_of(module, self._leaf_dtypes.get(path))
        known = [(module, self._leaf_dtypes[path]) for path, module in leaves]
        namespaces = list(self._watched(inner))
        return _Tree(inner, _children(inner), known, namespaces, object())

    def _watched(self, modules: list[nn.Module]) -> Iterator[_Namespace]:
        for number, values in enumerate(_namespaces(modules)):
            names = tuple(
                name
                for name, value in values.items()
                if name not in UNWATCHED
                and not name.endswith("_hooks")
                and not name.startswith(SHARDING)
                and not _is_our_own(value)
                and f"{number}.{name}" not in self._ignored
            )
            yield _Namespace(values, len(values), names, _reader(names))


def _same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _children(modules: list[nn.Module]) -> list[nn.Module | None]:
    return list(chain.from_iterable([module._modules.values() for module in modules]))


def _values(tree: _Tree) -> list[object]:
    return list(chain.from_iterable([one.read(one.values) for one in tree.namespaces]))


def _other_objects(before: list[object], now: list[object]) -> bool:
    """Whether an attribute is another object than before that may be a configuration."""
    if len(before) != len(now) or _same_objects(before, now):
        return False
    return any(one is not two and type(two) not in PLAIN for one, two in zip(before, now, strict=True))


def _dtypes(tree: _Tree) -> tuple[torch.dtype | None, ...]:
    own = chain.from_iterable([module._parameters.values() for module in tree.inner])
    dtypes = [one.dtype for one in own if one is not None]
    return (*dtypes, *[_dtype_of(leaf, before) for leaf, before in tree.leaves])


def _is_our_own(value: object) -> bool:
    """Whether an attribute is what a rewrite has put there."""
    return type(value).__module__.partition(".")[0] == "madtp"


def _is_leaf(module: nn.Module) -> bool:
    return not module._modules and type(module) in LEAVES


def _dtype_of(leaf: nn.Module, otherwise: torch.dtype | None) -> torch.dtype | None:
    first = next(iter(leaf._parameters.values()), None)
    return otherwise if first is None else first.dtype


def _reader(names: tuple[str, ...]) -> Reader:
    if len(names) > 1:
        return operator.itemgetter(*names)
    if names:
        return lambda values: (values[names[0]],)
    return lambda values: ()


def _namespaces(modules: list[nn.Module]) -> Iterator[Mapping[str, Any]]:
    """The attributes of modules, then those of the configurations that they hold, each once."""
    found: list[Mapping[str, Any]] = [vars(module) for module in modules]
    yield from found
    seen = set(map(id, found))
    for _ in range(DEPTH):
        inside = [value for holder in found for name, value in holder.items() if name not in UNWATCHED]
        deeper = [values for value in inside if (values := _configuration(value)) is not None]
        found = []
        for values in deeper:
            if id(values) not in seen:
                seen.add(id(values))
                found.append(values)
        yield from found


def _configuration(value: object) -> Mapping[str, Any] | None:
    """The attributes of an object that is plain data; None of any other."""
    if type(value) is dict:
        return value if value and all(type(key) is str for key in value) and _holds_plain(value) else None
    if isinstance(value, NO_CONFIGURATION) or type(value).__module__.partition(".")[0] in NO_CONFIGURATIONS_OF:
        return None
    values = getattr(value, "__dict__", None)
    return values if type(values) is dict and _holds_plain(values) else None


def _holds_plain(values: Mapping[str, Any]) -> bool:
    return any(type(value) in PLAIN for value in values.values())


class _Itself:
    """Stands for a value that is compared by identity. It keeps the value, as ids of values that are gone are used again."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _plain(value: object) -> object:
    """A value that can be compared: of containers of plain values these; anything else is like itself alone."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, (list, tuple)) and all(type(one) in PLAIN for one in value):
        return type(value), *value
    if type(value) is dict or isinstance(value, nn.Module):  # looked at by themselves
        return type(value)
    return _Itself(value)
