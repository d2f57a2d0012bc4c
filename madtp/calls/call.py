"""Calls of a model in a normal form, and the signature that decides which capture serves a call.

Start at :func:`normalise_call`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import batch_size
from madtp.calls.image_positions import WRITTEN
from madtp.calls.objects import Blueprint, Form, held_state, open_tree
from madtp.errors import ExampleInputsError

Inputs: TypeAlias = Mapping[str, Any] | tuple[Any, ...]
"""Inputs of a model: keyword arguments as a dict, or positional ones as a tuple."""


@dataclass(frozen=True)
class Call:
    """One call of a model, brought into a normal form: everything that can be named is passed by name.

    form: where objects that later calls read again (a key/value cache) were opened as their tensors; None: nowhere.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    form: Form | None = None

    def opened(self, sizes: Collection[str] | None = ()) -> Call:
        """The call with objects opened as their tensors, and numbers at the paths ``sizes`` in them (None: all).

        Raises :class:`madtp.calls.objects.CannotOpen`.
        """
        if self.form is not None or held_state((self.args, self.kwargs)) is None:
            return self
        own, told = self._own()
        (args, kwargs), form = open_tree((self.args, own), sizes)
        return Call(args, {**kwargs, **told}, form)

    def _own(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments by name that the module itself takes, and the one that its program is told beside them."""
        told = {name: value for name, value in self.kwargs.items() if name == WRITTEN}
        return {name: value for name, value in self.kwargs.items() if name != WRITTEN}, told

    def with_leaves(self, leaves: list[Any]) -> Call:
        """The call with other leaves in the same places."""
        args, kwargs = pytree.tree_unflatten(leaves, self.flat()[1])
        return replace(self, args=args, kwargs=kwargs)

    def held(self) -> set[int]:
        """Leaves that are tensors and sizes of opened objects."""
        if self.form is None:
            return set()
        found: set[int] = set()
        position = 0
        places = dict(self.form.held)
        for place, part in enumerate(self.form.spec.flatten_up_to((self.args, self._own()[0]))):
            if place in places:
                found.update(range(position, position + len(part)))
            position += len(part) if place in places else 1
        return found

    def sizes(self) -> tuple[str, ...]:
        """Numbers that were opened, by their path in an object."""
        return () if self.form is None else tuple(path for _, one in self.form.held for path in one.sizes())

    def goes_on(self) -> bool:
        """Whether it reads tokens that an earlier call has kept in an object."""
        leaves = self.flat()[0]
        return any(isinstance(leaves[at], Tensor) and leaves[at].dim() > 0 for at in self.held())

    def flat(self) -> tuple[list[Any], pytree.TreeSpec]:
        """Leaves of ``(args, kwargs)`` in placeholder order, and their structure."""
        return pytree.tree_flatten((self.args, self.kwargs))

    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.flat()[0] if isinstance(leaf, Tensor)]

    def samples(self) -> int:
        """Samples in the batch."""
        return batch_size(self.flat()[0])

    def leaf_at(self, place: str) -> Any:
        """The leaf at a place that is named as pytree does; None if there is none."""
        leaves, _ = pytree.tree_flatten_with_path((self.args, self.kwargs))
        return next((leaf for path, leaf in leaves if pytree.keystr(path) == place), None)

    def with_written(self, written: Tensor) -> Call:
        """The call with a further argument that says to which positions ``[B, N]`` another modality was written."""
        return replace(self, kwargs={**self.kwargs, WRITTEN: written})


@dataclass(frozen=True)
class Signature:
    """What a capture depends on: structure, constants, frozen sizes, the training flags of the modules, and what the objects
    of a call hold beside their tensors."""

    structure: str
    leaves: tuple[Any, ...]
    modes: tuple[bool, ...]
    held: tuple[Blueprint, ...] = ()


def normalise_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Bind ``args`` and ``kwargs`` to the parameter names of ``model.forward``.

    Raises :class:`ExampleInputsError` if they do not fit the signature.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"the inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {error}. "
            f"Given: {', '.join(kwargs) or f'{len(args)} positional ones'}. "
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
    return Call(tuple(positional), named)


def check_batch(model: nn.Module, call: Call) -> None:
    """Refuse example inputs without tensors, of one sample, or that disagree on the batch size.

    Where first dimensions differ the model has the word: it may take patches of all images in one row.

    Raises :class:`ExampleInputsError`.
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
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*call.args, **call.kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ExampleInputsError(
            f"the example inputs disagree on the batch size (first dimensions {sorted(sizes)} of shapes {shapes}), and the "
            f"model fails on them: {type(error).__name__}: {error}. Give every tensor the same number of samples."
        ) from error


def signature(model: nn.Module, call: Call, dynamic: tuple[tuple[int, ...], ...] | None) -> Signature:
    """The signature of ``call``; sizes in ``dynamic`` (dimensions by leaf) are free, all others count. A size in an object is
    its own dimension 0."""
    leaves, spec = call.flat()
    described: list[Any] = []
    for position, leaf in enumerate(leaves):
        free = dynamic[position] if dynamic is not None and position < len(dynamic) else ()
        if not isinstance(leaf, Tensor):
            described.append((type(leaf).__name__, None if free else repr(leaf)))
            continue
        shape = tuple(-1 if d in free else n for d, n in enumerate(leaf.shape))
        described.append((str(leaf.dtype), shape))
    held = () if call.form is None else tuple(blueprint for _, blueprint in call.form.held)
    return Signature(str(spec), tuple(described), tuple(m.training for m in model.modules()), held)
