"""Adapters: what structure cannot tell about a family of models, keyed by the class or the module of the model.

Users call :func:`register_adapter`; the library asks :func:`find_adapter`. Nothing is imported to look a model up: the
key is compared with the qualified names of the model's own classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from madtp.errors import ConfigError

ExampleInputs = Callable[[nn.Module, int, torch.Generator], dict[str, Any]]

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_adapters: dict[str, Adapter] = {}


@dataclass(frozen=True)
class Adapter:
    """What the zoo knows of one class of models, or of all classes below one module.

    Attributes:
        key: qualified name of a class ("transformers.models.clip.modeling_clip.CLIPModel"), which serves its subclasses
            too, or of a module or package ("timm"), which serves what it defines.
        example_inputs: makes a small valid batch from (model, batch size, generator): keyword arguments.
        protect: positions that mean something which the graph does not show, by modality, as in `PruningConfig.protect`: the
            first token of a question whose states are all read alike, say.
    """

    key: str
    example_inputs: ExampleInputs
    protect: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ConfigError(
                f"'{self.key}' is no qualified name of a class or module, such as 'package.module.Class'."
            )
        if not callable(self.example_inputs):
            raise ConfigError(f"The adapter of '{self.key}' needs a function as example_inputs.")


def register_adapter(
    key: str, example_inputs: ExampleInputs, *, protect: Mapping[str, tuple[int, ...]] | None = None
) -> Adapter:
    """Teach the zoo a family of models; see :class:`Adapter` for the arguments.

    Raises:
        ConfigError: the key is taken or malformed.
    """
    adapter = Adapter(key, example_inputs, dict(protect or {}))
    if key in _adapters:
        raise ConfigError(f"An adapter is registered for '{key}' already; register a subclass, or another key.")
    _adapters[key] = adapter
    return adapter


def find_adapter(model: nn.Module) -> Adapter | None:
    """The adapter of the nearest class of `model`'s ancestry: its own name first, then its module from the inside out."""
    for kind in type(model).__mro__:
        if kind is nn.Module:
            return None
        name = f"{kind.__module__}.{kind.__qualname__}"
        while name:
            if name in _adapters:
                return _adapters[name]
            name = name.rpartition(".")[0]
    return None


def list_adapters() -> list[str]:
    """Keys of all adapters, sorted."""
    return sorted(_adapters)
