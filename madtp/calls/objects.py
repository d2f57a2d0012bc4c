"""Objects that a model keeps between calls, such as a key/value cache, as the tensors that they hold.

Start at :func:`flatten_objects`. A graph takes and returns tensors only. An object is therefore flattened by its attributes,
whatever its class: its tensors become leaves, and all else stays behind in an :class:`ObjectSpec`, by which it is put together
again. An object that cannot be flattened without loss is refused. :func:`on_tensors` makes a module that is called with such
leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.copies import share
from madtp.calls.image_positions import accepting_image_positions
from madtp.calls.structures import unflatten

TENSOR_FORWARD = "_madtp_tensor_forward"
CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

Forward: TypeAlias = Callable[..., object]


class CannotFlatten(Exception):
    """An object cannot be flattened. The message names its class, and why."""


class Constant(NamedTuple):
    """A value in an object that stays as it is. The type distinguishes constants that compare equal, such as 1 and True."""

    kind: type
    value: object


Part: TypeAlias = "ObjectSpec | Constant | Literal['tensor', 'size']"


@dataclass(frozen=True)
class ObjectSpec:
    """The structure of an object, without its tensors.

    Attributes:
        kind: its class.
        keys: names of its attributes, keys of a mapping, or positions in a sequence.
        parts: for each key a further spec, a constant, "tensor" for a tensor, or "size" for a number that follows from the
            sizes of tensors, such as a count of tokens seen.
    """

    kind: type
    keys: tuple[Hashable, ...]
    parts: tuple[Part, ...]

    def paths(self) -> tuple[str, ...]:
        """Return the paths of its tensors and sizes, in order."""
        return tuple(path for path, _ in self._leaves())

    def sizes(self) -> tuple[str, ...]:
        """Return the paths of its sizes."""
        return tuple(path for path, part in self._leaves() if part == "size")

    def kinds(self) -> tuple[object, ...]:
        """Return the classes of it and its parts, and where it holds tensors and sizes."""
        parts = (part.kinds() if isinstance(part, ObjectSpec) else part for part in self.parts)
        return self.kind, *("constant" if isinstance(part, Constant) else part for part in parts)

    def _leaves(self) -> Iterator[tuple[str, str]]:
        for key, part in zip(self.keys, self.parts, strict=True):
            if isinstance(part, str):
                yield f".{key}", part
            elif isinstance(part, ObjectSpec):
                yield from ((f".{key}{path}", kind) for path, kind in part._leaves())


@dataclass(frozen=True)
class FlattenedObjects:
    """Where nested containers held objects before these were replaced by lists of their tensors.

    Attributes:
        spec: structure of the containers, with objects as leaves.
        specs: the specs of the objects, by their position among these leaves.
    """

    spec: pytree.TreeSpec
    specs: tuple[tuple[int, ObjectSpec], ...]

    def paths(self) -> tuple[str, ...]:
        """Return the paths of tensors and sizes in the objects, in order."""
        return tuple(path for _, spec in self.specs for path in spec.paths())

    def sizes(self) -> tuple[str, ...]:
        """Return the paths of sizes in the objects."""
        return tuple(path for _, spec in self.specs for path in spec.sizes())

    def leaves(self, values: object) -> set[int]:
        """Return the positions of tensors and sizes of objects among all leaves of flattened ``values``."""
        found: set[int] = set()
        position = 0
        positions = {at for at, _ in self.specs}
        for at, part in enumerate(self.spec.flatten_up_to(values)):
            if at in positions:
                found.update(range(position, position + len(part)))
            position += len(part) if at in positions else 1
        return found


def object_kind(values: object) -> str | None:
    """Return the class name of the first object in nested containers; None if there is none.

    An object is what is neither a tensor nor a constant, such as a cache.
    """
    return next((type(leaf).__name__ for leaf in _leaves(values)[0] if is_object(leaf)), None)


def is_object(leaf: object) -> bool:
    """Return whether a leaf is an object that may hold tensors."""
    return not isinstance(leaf, (Tensor, torch.SymInt, *CONSTANTS))


def leaves_of(values: object) -> list[object]:
    """Return the leaves of nested containers; objects are leaves, whatever pytree knows of them."""
    return _leaves(values)[0]


def _leaves(values: object) -> tuple[list[object], pytree.TreeSpec]:
    return pytree.tree_flatten(values, is_leaf=lambda x: not _is_container(x))


def _is_container(value: object) -> bool:
    return isinstance(value, (tuple, list, dict)) or (
        isinstance(value, Mapping) and type(value) in pytree.SUPPORTED_NODES
    )


def flatten_object(value: object, sizes: Collection[str] | None = ()) -> tuple[ObjectSpec, list[object]]:
    """Flatten an object into its tensors and sizes.

    Args:
        value: the object.
        sizes: paths of numbers that are sizes; None if all numbers are.

    Raises:
        CannotFlatten: it holds something that is neither a tensor, a constant nor such an object, or one thing twice.
    """
    flattening = _Flattening(type(value).__name__, sizes)
    return flattening.spec_of(value, ""), flattening.leaves


class _Flattening:
    """Flattens one object, and collects its tensors and sizes in ``leaves``."""

    def __init__(self, name: str, sizes: Collection[str] | None) -> None:
        self.name, self.sizes = name, sizes
        self.leaves: list[object] = []
        self.seen: set[int] = set()

    def spec_of(self, value: object, path: str) -> ObjectSpec:
        if id(value) in self.seen:
            raise CannotFlatten(f"{self.name} (it holds a {type(value).__name__} in two places)")
        self.seen.add(id(value))
        items = _items(value, self.name)
        parts = tuple(self._part(part, f"{path}.{key}") for key, part in items)
        return ObjectSpec(type(value), tuple(key for key, _ in items), parts)

    def _part(self, part: object, path: str) -> Part:
        if isinstance(part, Tensor):
            self.leaves.append(part)
            return "tensor"
        if isinstance(part, torch.SymInt) or (type(part) is int and (self.sizes is None or path in self.sizes)):
            self.leaves.append(part)
            return "size"
        if isinstance(part, (*CONSTANTS, type, FunctionType)):
            return Constant(type(part), part)
        return self.spec_of(part, path)


def _items(value: object, name: str) -> list[tuple[Hashable, object]]:
    if type(value) is list or type(value) is tuple:
        return list(enumerate(value))
    if type(value) is dict:
        if all(isinstance(key, (str, int)) for key in value):
            return list(value.items())
    elif not isinstance(value, (nn.Module, Mapping, Sequence, Enum, torch.SymInt)):
        kinds = type(value).__mro__[:-1]
        plain = not any(kind.__module__ == "builtins" or kind.__dict__.get("__slots__") for kind in kinds)
        if plain and hasattr(value, "__dict__"):
            return list(value.__dict__.items())
    raise CannotFlatten(f"{name} (it holds a {type(value).__name__})")


def unflatten_object(spec: ObjectSpec, leaves: Iterator[object], device: torch.device | None = None) -> object:
    """Put an object together again from its tensors and sizes.

    Args:
        spec: the spec of the object.
        leaves: its tensors and sizes, from which as many as it needs are taken.
        device: takes the place of devices that it holds, if its tensors have moved. None to leave them.
    """
    parts: list[object] = []
    for part in spec.parts:
        if isinstance(part, str):
            parts.append(next(leaves))
        elif isinstance(part, ObjectSpec):
            parts.append(unflatten_object(part, leaves, device))
        else:
            parts.append(device if device is not None and isinstance(part.value, torch.device) else part.value)
    if spec.kind is list:
        return parts
    if spec.kind is tuple:
        return tuple(parts)
    if spec.kind is dict:
        return dict(zip(spec.keys, parts, strict=True))
    made: object = object.__new__(spec.kind)
    made.__dict__.update((str(key), part) for key, part in zip(spec.keys, parts, strict=True))
    return made


def flatten_objects(values: object, sizes: Collection[str] | None = ()) -> tuple[object, FlattenedObjects]:
    """Return ``values`` with a list of its tensors and sizes in place of each object, and what is needed to go back.

    Args:
        values: nested containers.
        sizes: as in :func:`flatten_object`.

    Raises:
        CannotFlatten: from :func:`flatten_object`, or because one object occurs twice.
    """
    leaves, spec = _leaves(values)
    # Containers may order their entries anew, as outputs of transformers do.
    leaves, spec = _leaves(spec.unflatten(leaves))
    specs: list[tuple[int, ObjectSpec]] = []
    seen: set[int] = set()
    for position, leaf in enumerate(leaves):
        if is_object(leaf):
            if id(leaf) in seen:
                raise CannotFlatten(f"{type(leaf).__name__} (it is passed twice)")
            seen.add(id(leaf))
            object_spec, leaves[position] = flatten_object(leaf, sizes)
            specs.append((position, object_spec))
    return spec.unflatten(leaves), FlattenedObjects(spec, tuple(specs))


def flattening_error(values: object) -> str | None:
    """Return which object in nested containers cannot be flattened, and why; None if there is none."""
    try:
        flatten_objects(values)
    except CannotFlatten as error:
        return str(error)
    return None


def unflatten_objects(values: object, flattened: FlattenedObjects) -> tuple[object, list[object]]:
    """Undo :func:`flatten_objects`; also return the objects that were put together."""
    leaves = flattened.spec.flatten_up_to(values)
    made = [unflatten_object(spec, iter(leaves[position])) for position, spec in flattened.specs]
    for (position, _), one in zip(flattened.specs, made, strict=True):
        leaves[position] = one
    return unflatten(leaves, flattened.spec), made


def objects_in(values: object) -> list[object]:
    """Return the objects in nested containers, in order."""
    return [leaf for leaf in _leaves(values)[0] if is_object(leaf)]


@dataclass(frozen=True)
class ResultSpec:
    """The structure of what a call returned, and of the objects that were passed to it or that it made.

    Attributes:
        spec: the structure of the result, with objects as leaves.
        numbers: for each leaf the number of its object; None for all other leaves.
        objects: those that were passed first, then those that the call made.
    """

    spec: pytree.TreeSpec
    numbers: tuple[int | None, ...]
    objects: tuple[ObjectSpec, ...]

    def plain_count(self) -> int:
        """Return the number of leaves of the result that are not objects."""
        return self.numbers.count(None)

    def paths(self) -> tuple[str, ...]:
        """Return the paths of tensors and sizes in the objects, in order."""
        return tuple(path for spec in self.objects for path in spec.paths())

    def sizes(self) -> tuple[str, ...]:
        """Return the paths of sizes in the objects."""
        return tuple(path for spec in self.objects for path in spec.sizes())

    def close(self, plain: Sequence[object], tensors: Sequence[object], passed: Sequence[object]) -> object:
        """Return the result in its own structure.

        Args:
            plain: its leaves that are not objects.
            tensors: tensors and sizes of all objects.
            passed: the objects that were passed to the call; they are updated in place.
        """
        device = next((one.device for one in tensors if isinstance(one, Tensor)), None)
        remaining = iter(tensors)
        objects = [unflatten_object(spec, remaining, device) for spec in self.objects]
        for old, new in zip(passed, objects, strict=False):
            old.__dict__.clear()
            old.__dict__.update(new.__dict__)
        objects[: len(passed)] = passed
        others = iter(plain)
        return unflatten([next(others) if number is None else objects[number] for number in self.numbers], self.spec)


def flatten_result(
    result: object, passed: Sequence[object], sizes: Collection[str] = ()
) -> tuple[tuple[object, ...], tuple[object, ...], ResultSpec]:
    """Return the leaves of a result that are not objects, the tensors and sizes of the objects, and the structure.

    Raises:
        CannotFlatten: from :func:`flatten_object`.
    """
    leaves, spec = _leaves(result)
    objects = [*passed, *(leaf for leaf in leaves if is_object(leaf) and not any(leaf is one for one in passed))]
    flattened = [flatten_object(one, sizes) for one in objects]
    numbers = tuple(
        next((n for n, one in enumerate(objects) if one is leaf), None) if is_object(leaf) else None for leaf in leaves
    )
    plain = tuple(leaf for leaf, number in zip(leaves, numbers, strict=True) if number is None)
    tensors = tuple(tensor for _, own in flattened for tensor in own)
    return plain, tensors, ResultSpec(spec, numbers, tuple(object_spec for object_spec, _ in flattened))


class TensorForward:
    """A forward on tensors alone that runs a forward on objects: it takes and returns them flattened.

    Attributes:
        result_spec: how to close what the last call returned. None if there was no object in it or in the call.
    """

    def __init__(self, forward: Forward, objects: FlattenedObjects | None, sizes: Collection[str]) -> None:
        self.forward, self.objects, self.sizes = forward, objects, sizes
        self.result_spec: ResultSpec | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.objects is None:
            return self._flattened(self.forward(*args, **kwargs), [])
        values, passed = unflatten_objects((args, kwargs), self.objects)
        assert isinstance(values, tuple)
        positional, named = values
        return self._flattened(self.forward(*positional, **named), passed)

    def _flattened(self, result: object, passed: Sequence[object]) -> object:
        if not passed and object_kind(result) is None:
            self.result_spec = None
            return result
        plain, tensors, self.result_spec = flatten_result(result, passed, self.sizes)
        return plain, tensors


def on_tensors(module: nn.Module, objects: FlattenedObjects | None, sizes: Collection[str] = ()) -> nn.Module:
    """Return a module with the same parameters that is called with flattened objects, and may be told image positions.

    Args:
        module: is left as it is.
        objects: where the call holds objects; None if there are none.
        sizes: paths of numbers in objects that are sizes, where the module is not traced.
    """
    copy = share(module)
    tensor_forward = TensorForward(copy.forward, objects, sizes)

    @functools.wraps(copy.forward)
    def forward(*args: object, **kwargs: object) -> object:
        return tensor_forward(*args, **kwargs)

    copy.__dict__["forward"], copy.__dict__[TENSOR_FORWARD] = accepting_image_positions(forward), tensor_forward
    return copy


def result_spec_of(module: nn.Module) -> ResultSpec | None:
    """Return how to close what a module of :func:`on_tensors` last returned; None for any other, or without objects."""
    tensor_forward = module.__dict__.get(TENSOR_FORWARD)
    return tensor_forward.result_spec if isinstance(tensor_forward, TensorForward) else None
