"""Calls of a model in a normal form, and the signature that decides which capture serves a call.

Start at :func:`normalise_call`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import batch_size
from madtp.calls.image_positions import IMAGE_POSITIONS
from madtp.calls.module_states import ModuleState
from madtp.calls.objects import FlattenedObjects, ObjectSpec, flatten_objects, object_kind
from madtp.calls.structures import in_declared_order
from madtp.errors import ExampleInputsError

Inputs: TypeAlias = Mapping[str, Any] | tuple[Any, ...]
"""Inputs of a model: keyword arguments as a dict, or positional ones as a tuple."""


@dataclass(frozen=True)
class Call:
    """One call of a model in a normal form: everything that can be named is passed by name.

    Attributes:
        args: positional arguments.
        kwargs: arguments by name.
        objects: where key/value caches and other objects were replaced by lists of their tensors. None if none was.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    objects: FlattenedObjects | None = None

    def flattened(self, sizes: Collection[str] | None = ()) -> Call:
        """Return the call with a list of its tensors and sizes in place of each object.

        Args:
            sizes: paths of numbers in objects that are sizes; None if all numbers are.

        Raises:
            CannotFlatten: an object cannot be flattened.
        """
        if self.objects is not None or object_kind((self.args, self.kwargs)) is None:
            return self
        further = {name: value for name, value in self.kwargs.items() if name == IMAGE_POSITIONS}
        values, objects = flatten_objects((self.args, self._own_kwargs()), sizes)
        assert isinstance(values, tuple)
        args, kwargs = values
        return Call(args, {**kwargs, **further}, objects)

    def _own_kwargs(self) -> dict[str, Any]:
        """Arguments by name that the module itself takes, without those that only its program is told."""
        return {name: value for name, value in self.kwargs.items() if name != IMAGE_POSITIONS}

    def with_leaves(self, leaves: list[Any]) -> Call:
        """Return the call with other leaves in the same structure."""
        args, kwargs = pytree.tree_unflatten(leaves, self.flat()[1])
        return replace(self, args=args, kwargs=kwargs)

    def with_image_positions(self, positions: Tensor) -> Call:
        """Return the call with a further argument, ``[B, N]`` bool: which positions of a text sequence hold image features."""
        return replace(self, kwargs={**self.kwargs, IMAGE_POSITIONS: positions})

    def flat(self) -> tuple[list[Any], pytree.TreeSpec]:
        """Return the leaves of ``(args, kwargs)``, in the order of a graph's placeholders, and their structure."""
        return pytree.tree_flatten((self.args, self.kwargs))

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the leaves."""
        return [leaf for leaf in self.flat()[0] if isinstance(leaf, Tensor)]

    def samples(self) -> int:
        """Return the number of samples in the batch."""
        return batch_size(self.flat()[0])

    def leaf_at(self, path: str) -> object:
        """Return the leaf at a path in pytree's notation; None if there is none."""
        leaves, _ = pytree.tree_flatten_with_path((self.args, self.kwargs))
        return next((leaf for keys, leaf in leaves if pytree.keystr(keys) == path), None)

    def cache_leaves(self) -> set[int]:
        """Return the positions of those leaves that are tensors or sizes of flattened objects."""
        return set() if self.objects is None else self.objects.leaves((self.args, self._own_kwargs()))

    def sizes(self) -> tuple[str, ...]:
        """Return the paths of the sizes in flattened objects."""
        return () if self.objects is None else self.objects.sizes()

    def continues(self) -> bool:
        """Return whether the call reads tokens that an earlier call has put into an object."""
        leaves = self.flat()[0]
        return any(isinstance(leaves[at], Tensor) and leaves[at].dim() > 0 for at in self.cache_leaves())


class LeafSignature(NamedTuple):
    """A leaf in a signature: dtype and shape (-1 for a free size) of a tensor, type and value of anything else."""

    kind: str
    value: tuple[int, ...] | str | None


@dataclass(frozen=True)
class Signature:
    """What a capture depends on.

    Attributes:
        structure: containers and names of the arguments.
        leaves: constants, dtypes and sizes.
        modules: training flags and dtypes.
        objects: what the objects of a call hold besides tensors.
    """

    structure: str
    leaves: tuple[LeafSignature, ...]
    modules: ModuleState
    objects: tuple[ObjectSpec, ...] = ()


def normalise_call(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    parameters: inspect.Signature | None = None,
) -> Call:
    """Bind ``args`` and ``kwargs`` to the parameter names of ``model.forward``.

    Args:
        model: the module that is called.
        args: positional arguments.
        kwargs: arguments by name.
        parameters: the signature of ``model.forward``, which a compiler cannot find out. None finds it out.

    Raises:
        ExampleInputsError: they do not fit the signature.
    """
    try:
        bound = (parameters or inspect.signature(model.forward)).bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"the inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {error}. "
            f"{_misspelt(model, kwargs)}Given: {', '.join(kwargs) or f'{len(args)} positional ones'}. "
            "Pass a dict of keyword arguments, or a tuple of positional ones."
        ) from error
    named: dict[str, Any] = {}
    positional: list[Any] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            positional = [bound.arguments[p] for p in bound.arguments if p != name and p in list(named)]
            named = {k: v for k, v in named.items() if k not in bound.arguments}
            positional.extend(value)
        elif kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[name] = value
    # The order in which a container was filled is not the call's, and a capture would not keep it.
    return Call(tuple(map(in_declared_order, positional)), {name: in_declared_order(x) for name, x in named.items()})


def _misspelt(model: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """A question for each name that is nearly one of an argument."""
    known = list(inspect.signature(model.forward).parameters)
    near = {name: difflib.get_close_matches(name, known, n=1) for name in kwargs if name not in known}
    return "".join(f"{name!r} is no argument; did you mean {found[0]!r}? " for name, found in near.items() if found)


def is_empty(call: Call) -> bool:
    """Return whether a call holds tensors, and none of them holds a sample."""
    tensors = call.tensors()
    return bool(tensors) and all(one.dim() > 0 and one.shape[0] == 0 for one in tensors)


def check_batch(model: nn.Module, call: Call) -> None:
    """Refuse example inputs that hold no tensor or only one sample, or whose batch sizes disagree.

    Where first dimensions differ, the model is run to decide: it may take the patches of all images in one row.

    Raises:
        ExampleInputsError: the inputs are refused.
    """
    tensors = [t for t in call.tensors() if t.dim() > 0]
    if not tensors:
        raise ExampleInputsError("the example inputs hold no tensor; pass the tensors the model is called with.")
    sizes = {t.shape[0] for t in tensors}
    if batch_size(tensors) < 2:
        raise ExampleInputsError(
            "the example inputs hold one sample; give at least 2, so that the batch axis can be told from axes of size 1."
        )
    if len(sizes) == 1:
        return
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ExampleInputsError(
            f"the example inputs disagree on the batch size (first dimensions {sorted(sizes)} of shapes {shapes}), and the "
            f"model fails on them: {type(error).__name__}: {error}. Give every tensor the same number of samples."
        ) from error


def signature(call: Call, dynamic: tuple[tuple[int, ...], ...] | None, modules: ModuleState) -> Signature:
    """Return the signature of ``call``.

    Args:
        call: the call.
        dynamic: for each leaf its free dimensions, which do not count; a size in an object is its own dimension 0. None if
            all sizes count.
        modules: from :class:`~madtp.calls.module_states.ModuleStates` of the module that is called.
    """
    leaves, spec = call.flat()
    described: list[LeafSignature] = []
    first: dict[int, int] = {}
    for position, leaf in enumerate(leaves):
        free = dynamic[position] if dynamic is not None and position < len(dynamic) else ()
        if not isinstance(leaf, Tensor):
            described.append(LeafSignature(type(leaf).__name__, None if free else repr(leaf)))
            continue
        shape = tuple(-1 if d in free else n for d, n in enumerate(leaf.shape))
        # A capture takes one tensor that is given twice for one input.
        same = first.setdefault(id(leaf), position)
        described.append(LeafSignature(str(leaf.dtype) if same == position else f"input {same}", shape))
    objects = () if call.objects is None else tuple(object_spec for _, object_spec in call.objects.specs)
    return Signature(str(spec), tuple(described), modules, objects)
