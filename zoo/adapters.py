"""Adapters: what the structure of a model cannot tell, keyed by the class or the module of the model.

Users call :func:`register_adapter`; the library asks :func:`find_adapter`. Looking a model up imports nothing: the key is
compared with the qualified names of the model's own classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from madtp.errors import ConfigError, UnknownModelError
from zoo.named import Registry

ExampleInputs = Callable[[nn.Module, int, torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Adapter:
    """What the zoo knows of one class of models, or of all classes below one module.

    Attributes:
        key: The qualified name of a class ("transformers.models.clip.modeling_clip.CLIPModel"), which serves its subclasses
            too, or of a module or package ("timm"), which serves the classes defined in it.
        example_inputs: Makes a small valid batch, as keyword arguments, from a model, a batch size and a generator.
        protect: Positions that matter although the graph does not show it, by modality, as in ``PruningConfig.protect``: the
            first token of a question whose states are all read alike, say.
    """

    key: str
    example_inputs: ExampleInputs
    protect: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.example_inputs):
            raise ConfigError(f"The adapter of '{self.key}' needs a function as example_inputs.")


ADAPTERS: Registry[Adapter] = Registry(
    "adapter",
    names=re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"),
    advice="give the qualified name of a class or module, such as 'package.module.Class'",
    unknown=UnknownModelError,
)


def register_adapter(
    key: str, example_inputs: ExampleInputs, *, protect: Mapping[str, tuple[int, ...]] | None = None
) -> Adapter:
    """Teach the zoo a family of models.

    Args:
        key: The qualified name of a class, which serves its subclasses too, or of a module or package.
        example_inputs: Makes a small valid batch, as keyword arguments, from a model, a batch size and a generator.
        protect: Positions that are never pruned although the graph does not show why, by modality: ``{"text": (0,)}``.

    Returns:
        The adapter, as it is registered.

    Raises:
        ConfigError: The key is taken or malformed.
    """
    adapter = Adapter(key, example_inputs, dict(protect or {}))
    ADAPTERS.add(key, adapter)
    return adapter


def find_adapter(model: nn.Module) -> Adapter | None:
    """Return the adapter of the nearest class among a model's ancestors, or None.

    For each class, its own name is looked up first, then its module and the packages around it.
    """
    for kind in type(model).__mro__:
        if kind is nn.Module:
            return None
        name = f"{kind.__module__}.{kind.__qualname__}"
        while name:
            if name in ADAPTERS:
                return ADAPTERS[name]
            name = name.rpartition(".")[0]
    return None


def list_adapters() -> list[str]:
    """Return the keys of all adapters, sorted."""
    return ADAPTERS.matching()
