"""What of a module tree a capture depends on: :class:`ModuleStates`. Every call asks.

Python reads attributes of modules and of their configurations while it is traced, and none of that is in the graph. So a
switch that is set after the rewrite belongs to the kind of a call, as its shapes do.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from madtp.calls.compiling import is_compiling
from madtp.calls.plain_values import DEPTH, PLAIN, comparable, configuration_of

# What torch keeps in every module.
UNWATCHED = frozenset((*vars(nn.Module()), "_compiled_call_impl"))
SHARDING = ("__composable_api_state", "_fsdp_", "_is_fsdp_")
"""How names begin that torch gives its marks on modules whose parameters are sharded."""
REQUIRES_GRAD = "requires_grad"
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
Reader = Callable[[Mapping[str, Any]], Any]


class ModuleState(NamedTuple):
    """What of a module tree a capture depends on.

    Attributes:
        training: the training flag of each module, where it may matter.
        dtypes: the dtype of each parameter and buffer, None for those that are None; models cast what they are given to that of
            their weights.
        attributes: the attributes of modules that are more than one operation, and of configurations; then which parameters
            want a gradient, if that is not as it was.
        shapes: of each buffer, which a model may enlarge as it runs; None for those that are None.
        ties: of tensors that had several names, which of the names still stand for one tensor.
    """

    training: tuple[bool, ...]
    dtypes: tuple[torch.dtype | None, ...]
    attributes: tuple[object, ...] = ()
    shapes: tuple[torch.Size | None, ...] = ()
    ties: tuple[tuple[int, ...], ...] = ()


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


class _Place(NamedTuple):
    """Where a module keeps a parameter or buffer: in ``holder`` under ``name``."""

    holder: Mapping[str, Tensor | None]
    name: str


class _Tree(NamedTuple):
    """A module tree as it was found.

    Attributes:
        inner: the modules that are no leaves.
        children: the children of these.
        leaves: modules that stand for one operation, with the dtype of their first parameter.
        namespaces: the attributes that are watched.
        tied: where the names of each tensor that had several are kept.
        token: another object for every walk.
    """

    inner: list[nn.Module]
    children: list[nn.Module | None]
    leaves: list[tuple[nn.Module, torch.dtype | None]]
    namespaces: list[_Namespace]
    tied: list[list[_Place]]
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
    later is called as they were. While a compiler follows, all but modes is that of the last call.

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
        self._tied = _tied_names(self._named_modules())
        self._wanted = _gradients_wanted([module for _, module in self._named_modules()])
        self._tree: _Tree | None = self._walked()
        self._last: tuple[list[object], tuple[object, ...]] = ([], ())
        self._state = ModuleState((), ())

    def __deepcopy__(self, memo: dict[int, object]) -> ModuleStates:
        # The copies of the modules are not complete yet, so the first call walks through them.
        fresh = copy.copy(self)
        memo[id(self)] = fresh
        fresh._leaf_dtypes = dict(self._leaf_dtypes)
        fresh._model, fresh._tree, fresh._last = copy.deepcopy(self._model, memo), None, ([], ())
        fresh._state = self._state._replace(attributes=())
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
            self._state = ModuleState(
                training=(),
                dtypes=_dtypes(tree),
                attributes=self._last[1],
                shapes=_shapes(tree),
                ties=tuple([_ties(places) for places in tree.tied]),
            )
        return self._state._replace(training=tuple([module.training for module in tree.inner]))

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
        return values, tuple([comparable(value) for value in values])

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
        if f"{len(namespaces)}.{REQUIRES_GRAD}" not in self._ignored:
            namespaces.append(self._wants_gradients())
        modules = dict(named)
        tied = [
            [_Place(getattr(modules[path], kind), name) for path, kind, name in names if path in modules]
            for names in self._tied
        ]
        return _Tree(inner, _children(inner), known, namespaces, tied, object())

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

    def _wants_gradients(self) -> _Namespace:
        everything = [module for _, module in self._named_modules()]

        def other(_: Mapping[str, Any]) -> tuple[str | None]:
            now = _gradients_wanted(everything) if torch.is_grad_enabled() else self._wanted
            return (None if now == self._wanted else now,)

        return _Namespace({}, 0, (REQUIRES_GRAD,), other)


def _gradients_wanted(modules: Iterable[nn.Module]) -> str:
    """Which parameters of some modules want a gradient, a letter for each."""
    own = chain.from_iterable([module._parameters.values() for module in modules])
    return sys.intern("".join(["-" if one is None else "01"[one.requires_grad] for one in own]))


def _tied_names(modules: Iterable[tuple[str, nn.Module]]) -> list[list[tuple[str, str, str]]]:
    """The names, by path, kind and name in the module, of each parameter or buffer that has several."""
    names: dict[int, list[tuple[str, str, str]]] = {}
    for path, module in modules:
        for kind in ("_parameters", "_buffers"):
            for name, value in getattr(module, kind).items():
                if value is not None:
                    names.setdefault(id(value), []).append((path, kind, name))
    return [found for found in names.values() if len(found) > 1]


def _ties(places: list[_Place]) -> tuple[int, ...]:
    """Of each name of a tensor, the first name that stands for the same one now."""
    values = [place.holder.get(place.name) for place in places]
    return tuple([next(at for at, other in enumerate(values) if other is value) for value in values])


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
    own = chain.from_iterable([(*module._parameters.values(), *module._buffers.values()) for module in tree.inner])
    dtypes = [None if one is None else one.dtype for one in own]
    return (*dtypes, *[_dtype_of(leaf, before) for leaf, before in tree.leaves])


def _shapes(tree: _Tree) -> tuple[torch.Size | None, ...]:
    buffers = chain.from_iterable([module._buffers.values() for module in tree.inner])
    return tuple([None if one is None else one.shape for one in buffers])


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
        deeper = [values for value in inside if (values := configuration_of(value)) is not None]
        found = []
        for values in deeper:
            if id(values) not in seen:
                seen.add(id(values))
                found.append(values)
        yield from found
