"""Batches that a pruned model is run on: as calls of it (:func:`calls_of`), and in eval mode (:func:`evaluating`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from madtp.calls.call import Call, Inputs, normalise_call
from madtp.errors import ExampleInputsError
from madtp.pruned import PrunedModel


def as_call(pruned: PrunedModel, batch: Inputs) -> Call:
    """Return one batch as a call of the model.

    Raises:
        ExampleInputsError: it does not fit the model.
    """
    if isinstance(batch, Mapping):
        return normalise_call(pruned, (), batch)
    return normalise_call(pruned, tuple(batch), {})


def calls_of(pruned: PrunedModel, batches: Iterable[Inputs]) -> list[Call]:
    """Return batches as calls of the model.

    Raises:
        ExampleInputsError: there are none, or they do not fit the model.
    """
    if not isinstance(batches, Iterable):
        raise ExampleInputsError(f"batches is {type(batches).__name__}; pass a list or a loader of batches.")
    if isinstance(batches, (Mapping, Tensor, str)):
        raise ExampleInputsError(f"batches is one {type(batches).__name__}; pass a list of batches.")
    calls = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Mapping, tuple)):
            raise ExampleInputsError(
                f"batch {number} is a {type(batch).__name__}; pass dicts of keyword arguments or tuples of positional ones. "
                "Of a loader whose batches are lists of what forward takes: map(tuple, loader)."
            )
        call = as_call(pruned, batch)
        if not any(t.dim() for t in call.tensors()):
            raise ExampleInputsError(f"batch {number} holds no tensor.")
        calls.append(call)
    if not calls:
        raise ExampleInputsError("there are no batches; give at least one (an iterator may have been used up).")
    return calls


@contextmanager
def evaluating(pruned: PrunedModel) -> Iterator[None]:
    """Run the model in eval mode inside the block; each module gets its own mode back."""
    modules = list(pruned.modules())
    modes = [m.training for m in modules]
    pruned.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
