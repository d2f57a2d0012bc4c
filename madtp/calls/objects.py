"""Objects that calls of a model pass on to later calls, such as a key/value cache: opened as the tensors that they hold.

Start at :func:`open_tree`. A graph takes and returns tensors only. An object is therefore taken apart by its attributes,
whatever its class: tensors come out as leaves, all else stays behind in a :class:`Blueprint`, by which it is put together
again. What cannot be taken apart without loss is not opened.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.copies import share
from madtp.calls.image_positions import takes_written
from madtp.calls.structures import unflatten

OPENING = "_madtp_opening"
CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class CannotOpen(Exception):
    """An object cannot be taken apart; the message is its kind, and why."""


@dataclass(frozen=True)
class Blueprint:
    """What an object is made of beside its tensors.

    kind: its class. keys: names of its attributes, keys of a mapping, or places in a sequence. parts: by key, a further
    blueprint, "tensor" where a tensor stood, "size" where a number stood that follows from sizes of tensors (a count of tokens
    seen), or a constant in a tuple of its type and itself.
    """

    kind: type
    keys: tuple[Any, ...]
    parts: tuple[Any, ...]

    def count(self) -> int:
        """How many tensors and sizes it takes."""
        return len(self.paths())

    def paths(self) -> tuple[str, ...]:
        """Where its tensors and sizes stand, in order."""
        return tuple(path for path, _ in self._places())

    def sizes(self) -> tuple[str, ...]:
        """Where its sizes stand."""
        return tuple(path for path, part in self._places() if part == "size")

    def _places(self) -> Iterator[tuple[str, str]]:
        for key, part in zip(self.keys, self.parts, strict=True):
            if isinstance(part, str):
                yield f".{key}", part
            elif isinstance(part, Blueprint):
                yield from ((f".{key}{path}", kind) for path, kind in part._places())


@dataclass(frozen=True)
class Form:
    """A nest of containers in which objects were opened. spec: with objects as leaves. held: objects, by place among these
    leaves."""

    spec: pytree.TreeSpec
    held: tuple[tuple[int, Blueprint], ...]


def held_state(values: Any) -> str | None:
    """The kind of an object in a nest of containers that is neither a tensor nor a constant: something that later calls
    may read again. None if there is none."""
    return next((type(leaf).__name__ for leaf in _leaves(values)[0] if is_held(leaf)), None)


def is_held(leaf: Any) -> bool:
    """Whether a leaf of a call is an object that may hold tensors."""
    return not isinstance(leaf, (Tensor, torch.SymInt, *CONSTANTS))


def _leaves(values: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(values, is_leaf=lambda x: not _is_container(x))


def _is_container(value: Any) -> bool:
    return isinstance(value, (tuple, list, dict)) or (
        isinstance(value, Mapping) and type(value) in pytree.SUPPORTED_NODES
    )


def open_object(value: Any, sizes: Collection[str] | None = ()) -> tuple[Blueprint, list[Any]]:
    """Take an object apart into its tensors and sizes; ``sizes``: where numbers stand that are such; None: everywhere.

    Raises:
        CannotOpen: it holds something that is neither a tensor, a constant nor such an object, or one thing twice.
    """
    opening = _Taking(type(value).__name__, sizes)
    return opening.apart(value, ""), opening.leaves


class _Taking:
    """Takes one object apart. leaves: its tensors and sizes."""

    def __init__(self, name: str, sizes: Collection[str] | None) -> None:
        self.name, self.sizes = name, sizes
        self.leaves: list[Any] = []
        self.seen: set[int] = set()

    def apart(self, value: Any, path: str) -> Blueprint:
        if id(value) in self.seen:
            raise CannotOpen(f"{self.name} (it holds a {type(value).__name__} in two places)")
        self.seen.add(id(value))
        items = _items(value, self.name)
        return Blueprint(type(value), tuple(items), tuple(self._part(x, f"{path}.{key}") for key, x in items.items()))

    def _part(self, part: Any, path: str) -> Any:
        if isinstance(part, Tensor):
            self.leaves.append(part)
            return "tensor"
        if isinstance(part, torch.SymInt) or (type(part) is int and (self.sizes is None or path in self.sizes)):
            self.leaves.append(part)
            return "size"
        if isinstance(part, (*CONSTANTS, type, FunctionType)):
            return (type(part), part)
        return self.apart(part, path)


def _items(value: Any, name: str) -> dict[Any, Any]:
    if type(value) in (list, tuple):
        return dict(enumerate(value))
    if type(value) is dict:
        if all(isinstance(key, (str, int)) for key in value):
            return value
    elif not isinstance(value, (nn.Module, Mapping, Sequence, Enum, torch.SymInt)):
        kinds = type(value).__mro__[:-1]
        plain = not any(kind.__module__ == "builtins" or kind.__dict__.get("__slots__") for kind in kinds)
        if plain and hasattr(value, "__dict__"):
            return value.__dict__
    raise CannotOpen(f"{name} (it holds a {type(value).__name__})")


def close_object(blueprint: Blueprint, tensors: Iterator[Any], device: torch.device | None = None) -> Any:
    """Put an object together again; ``device``: that of its tensors, where they have moved since."""
    parts: list[Any] = []
    for part in blueprint.parts:
        if isinstance(part, str):
            parts.append(next(tensors))
        elif isinstance(part, Blueprint):
            parts.append(close_object(part, tensors, device))
        else:
            parts.append(device if device is not None and isinstance(part[1], torch.device) else part[1])
    if blueprint.kind in (list, tuple):
        return blueprint.kind(parts)
    named = dict(zip(blueprint.keys, parts, strict=True))
    if blueprint.kind is dict:
        return named
    made: Any = object.__new__(blueprint.kind)
    made.__dict__.update(named)
    return made


def open_tree(values: Any, sizes: Collection[str] | None = ()) -> tuple[Any, Form]:
    """``values`` with a list of its tensors and sizes in the place of each object.

    Raises:
        CannotOpen: from :func:`open_object`, or because one object stands in two places.
    """
    leaves, spec = _leaves(values)
    held, seen = [], set()
    for place, leaf in enumerate(leaves):
        if is_held(leaf):
            if id(leaf) in seen:
                raise CannotOpen(f"{type(leaf).__name__} (it is passed twice)")
            seen.add(id(leaf))
            blueprint, leaves[place] = open_object(leaf, sizes)
            held.append((place, blueprint))
    return spec.unflatten(leaves), Form(spec, tuple(held))


def cannot_open(values: Any) -> str | None:
    """The kind of an object in a nest of containers that cannot be taken apart, and why; None if there is none."""
    try:
        open_tree(values)
    except CannotOpen as error:
        return str(error)
    return None


def close_tree(values: Any, form: Form) -> tuple[Any, list[Any]]:
    """Inverse of :func:`open_tree`, and the objects that were put together."""
    leaves = form.spec.flatten_up_to(values)
    made = [close_object(blueprint, iter(leaves[place])) for place, blueprint in form.held]
    for (place, _), one in zip(form.held, made, strict=True):
        leaves[place] = one
    return unflatten(leaves, form.spec), made


def held_objects(values: Any) -> list[Any]:
    """The objects in a nest of containers, in order."""
    return [leaf for leaf in _leaves(values)[0] if is_held(leaf)]


@dataclass(frozen=True)
class Returned:
    """What a call returned, and what had become of the objects that were passed to it.

    spec: of the result, objects as leaves. places: for each leaf the number of its object, None for all others.
    objects: those that were passed first, then further ones that the call made.
    """

    spec: pytree.TreeSpec
    places: tuple[int | None, ...]
    objects: tuple[Blueprint, ...]

    def paths(self) -> tuple[str, ...]:
        """Where the tensors of the objects stand in them, in order."""
        return tuple(path for blueprint in self.objects for path in blueprint.paths())

    def sizes(self) -> tuple[str, ...]:
        """Which of these are numbers that follow from sizes of tensors."""
        return tuple(path for blueprint in self.objects for path in blueprint.sizes())

    def close(self, plain: Sequence[Any], tensors: Sequence[Any], passed: Sequence[Any]) -> Any:
        """The result in its own form; objects that were ``passed`` are brought up to date in place."""
        device = next((one.device for one in tensors if isinstance(one, Tensor)), None)
        remaining = iter(tensors)
        objects = [close_object(blueprint, remaining, device) for blueprint in self.objects]
        for old, new in zip(passed, objects, strict=False):
            old.__dict__.clear()
            old.__dict__.update(new.__dict__)
        objects[: len(passed)] = passed
        others = iter(plain)
        return unflatten([next(others) if at is None else objects[at] for at in self.places], self.spec)


def open_result(
    result: Any, passed: Sequence[Any], sizes: Collection[str] = ()
) -> tuple[tuple[Any, ...], tuple[Any, ...], Returned]:
    """Leaves of a result that are no objects, tensors and sizes of the objects, and how to close it.

    Raises:
        CannotOpen: from :func:`open_object`.
    """
    leaves, spec = _leaves(result)
    objects = [*passed, *(leaf for leaf in leaves if is_held(leaf) and not any(leaf is one for one in passed))]
    opened = [open_object(one, sizes) for one in objects]
    places = tuple(
        next((n for n, one in enumerate(objects) if one is leaf), None) if is_held(leaf) else None for leaf in leaves
    )
    plain = tuple(leaf for leaf, at in zip(leaves, places, strict=True) if at is None)
    tensors = tuple(tensor for _, own in opened for tensor in own)
    return plain, tensors, Returned(spec, places, tuple(blueprint for blueprint, _ in opened))


class Opening:
    """A forward on tensors alone that runs one on objects: takes and returns them opened.

    Attributes:
        returned: how to close what the last call returned; None where neither it nor the call held an object.
    """

    def __init__(self, forward: Callable[..., Any], form: Form | None, sizes: Collection[str]) -> None:
        self.forward, self.form, self.sizes = forward, form, sizes
        self.returned: Returned | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        passed: list[Any] = []
        if self.form is not None:
            (args, kwargs), passed = close_tree((args, kwargs), self.form)
        result = self.forward(*args, **kwargs)
        if not passed and held_state(result) is None:
            self.returned = None
            return result
        plain, tensors, self.returned = open_result(result, passed, self.sizes)
        return plain, tensors


def opened(module: nn.Module, form: Form | None, sizes: Collection[str] = ()) -> nn.Module:
    """A module with the same parameters that is called as an opened call says, and that may be told which positions were
    written; ``sizes``: numbers that are, where it is not traced."""
    copy = share(module)
    opening = Opening(copy.forward, form, sizes)

    @functools.wraps(copy.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return opening(*args, **kwargs)

    copy.__dict__["forward"], copy.__dict__[OPENING] = takes_written(forward), opening
    return copy


def returned_by(module: nn.Module) -> Returned | None:
    """How to close what an opened module last returned; None for any other, and where no object was held."""
    opening = module.__dict__.get(OPENING)
    return None if opening is None else opening.returned
