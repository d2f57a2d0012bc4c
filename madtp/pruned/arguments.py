"""What is given for a model, checked with words: :func:`check_model` and :func:`check_pruned`."""

from __future__ import annotations

from torch import nn

from madtp.errors import ArgumentError
from madtp.pruned.model import PrunedModel


def check_model(model: object) -> None:
    """Refuse what is no model.

    Raises:
        ArgumentError: it is a name, a class or something else.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise ArgumentError(f"model is the class {model.__name__}; pass an instance of it, with its weights.")
    hint = " Models of the zoo have names: zoo.create(name)." if isinstance(model, str) else ""
    raise ArgumentError(f"model is {_kind(model)}; pass an nn.Module.{hint}")


def check_pruned(pruned: object) -> None:
    """Refuse what is no pruned model.

    Raises:
        ArgumentError: it is a dense model, or none at all.
    """
    if isinstance(pruned, PrunedModel):
        return
    if isinstance(pruned, nn.Module):
        raise ArgumentError(
            f"this {type(pruned).__name__} is no pruned model. Rewrite it first, and pass what that returns: "
            "pruned = madtp.rewrite(model, example_inputs)."
        )
    raise ArgumentError(
        f"a pruned model is asked for, but this is {_kind(pruned)}; pass what madtp.rewrite or madtp.load returned."
    )


def _kind(value: object) -> str:
    return repr(value) if value is None or isinstance(value, str) else f"of type {type(value).__name__}"
