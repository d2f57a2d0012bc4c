"""Batches that a pruned model is run on by calibration and teaching: as calls of it, in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from madtp.calls.call import Call, normalise_call
from madtp.errors import ExampleInputsError
from madtp.pruned import PrunedModel


def calls_of(pruned: PrunedModel, batches: Iterable[Mapping[str, Any] | tuple[Any, ...]]) -> list[Call]:
    """Batches, dicts of keyword arguments or tuples of positional ones, as calls of the model.

    Raises:
        ExampleInputsError: there are none, or they do not fit the model.
    """
    if isinstance(batches, (Mapping, Tensor)):
        raise ExampleInputsError(f"batches is one {type(batches).__name__}; pass a list of batches.")
    calls = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Mapping, tuple)):
            raise ExampleInputsError(
                f"batch {number} is a {type(batch).__name__}; pass dicts of keyword arguments or tuples of positional ones."
            )
        args, kwargs = (batch, {}) if isinstance(batch, tuple) else ((), batch)
        call = normalise_call(pruned._host, args, kwargs)
        if not any(t.dim() for t in call.tensors()):
            raise ExampleInputsError(f"batch {number} holds no tensor.")
        calls.append(call)
    if not calls:
        raise ExampleInputsError("there are no batches; give at least one (an iterator may have been used up).")
    return calls


@contextmanager
def evaluating(pruned: PrunedModel) -> Iterator[None]:
    """The model in eval mode inside the block, its modules' own modes restored afterwards."""
    modules: list[nn.Module] = [*pruned.modules(), pruned._host]
    modes = [m.training for m in modules]
    pruned.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
