"""Small random models of real classes, for surveys and tests: ``build("hf:CLIPModel")`` makes a model and inputs offline.

Start with :func:`names` and :func:`build`. ``catalogue.py`` lists the architectures; ``hf.py``, ``timm.py`` and
``open_clip.py`` build them. ``shrink.py`` makes configurations small by the names of their fields, ``overrides.py`` holds what
these cannot tell.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import torch
from torch import nn

from madtp.calls.call import normalise_call
from madtp.errors import UnknownModelError
from zoo.builders import build_own, find_builder, names_builder
from zoo.registry import MODELS, create
from zoo.small.catalogue import CATALOGUE
from zoo.suggestions import did_you_mean

# Modules that a process that builds many models should import once.
PRELOAD = ("zoo.small.libraries",)
ZOO = "zoo"
_SEED = 0


def names(patterns: Sequence[str] = ()) -> list[str]:
    """Return the names that match any of the shell-style ``patterns`` (all when there are none), in the catalogue's order.

    A whole name that the catalogue lacks, such as ``hf:CLIPVisionModel``, comes last if its library is installed and has it. So
    do ``zoo:NAME``, a model of the zoo, and ``module:function``, one of the user's own code (see :mod:`zoo.builders`).

    Raises:
        UnknownModelError: A pattern matches nothing; the message lists near names.
        ConfigError: The module of a function cannot be imported.
    """
    for pattern in patterns:
        if names_builder(pattern):
            find_builder(pattern)
    known = [f"{library}:{name}" for library, listed in CATALOGUE.items() for name in listed]
    known += dict.fromkeys(pattern for pattern in patterns if pattern not in known and _is_installed(pattern))
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in known):
            advice = did_you_mean(pattern, known, otherwise=f"Libraries: {', '.join(CATALOGUE)}.")
            raise UnknownModelError(f"No small architecture matches {pattern!r}. {advice}")
    return [name for name in known if not patterns or any(_matches(name, p) for p in patterns)]


def generating(listed: Sequence[str]) -> list[str]:
    """Return those of the listed names whose models may write text: that have a method ``generate``, or are the user's own."""
    return [
        name
        for name in listed
        if names_builder(name) or (name.startswith("hf:") and _module_of("hf").generates(name.partition(":")[2]))
    ]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition(":")[2], pattern)


def _is_installed(name: str) -> bool:
    """Whether ``library:architecture`` names something that the installed library can build."""
    library, _, architecture = name.partition(":")
    if library not in CATALOGUE:
        return names_builder(name) or (library == ZOO and architecture in MODELS)
    try:
        return bool(_module_of(library).has(architecture))
    except ImportError:
        return False


def _module_of(library: str) -> ModuleType:
    return importlib.import_module(f"zoo.small.{library}")


def build_model(name: str) -> nn.Module:
    """Build the small model of that name in eval mode, with weights that let every token matter.

    Raises:
        UnknownModelError: The name has no library in front.
    """
    library, _, architecture = name.partition(":")
    if library not in CATALOGUE or not architecture:
        raise UnknownModelError(f"{name!r} is not the name of a small architecture, such as 'hf:CLIPModel'.")
    torch.manual_seed(_SEED)
    model: nn.Module = _module_of(library).build(architecture).eval()
    enliven(model)
    return model


def build(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """Build the model of that name and example inputs for it. One of the user's own code, or of the zoo, is built as it is.

    Raises:
        UnknownModelError: There is no such model.
        ConfigError: The function of a model of the user's own fails.
    """
    from zoo.examples import example_inputs

    if names_builder(name):
        torch.manual_seed(_SEED)
        own, inputs = build_own(name)
        if isinstance(inputs, tuple):
            inputs = normalise_call(own, inputs, {}).kwargs
        return own, example_inputs(own) if inputs is None else inputs
    library, _, entry = name.partition(":")
    if library == ZOO:
        torch.manual_seed(_SEED)
        model = create(entry)
    else:
        model = build_model(name)
    return model, example_inputs(model)


def further_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the example inputs of a model in the further forms that it takes: several images a sample, clips."""
    from zoo.inputs import forms

    return forms.further_inputs(model, inputs)


def enliven(model: nn.Module, seed: int = _SEED) -> None:
    """Draw weights anew: an initialisation with tables of 0.02 and scales of zero makes all tokens alike and hides errors.

    Args:
        model: Changed in place.
        seed: Of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.dtype.is_floating_point or not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if parameter.dim() > 2 else parameter.shape[1]
                parameter.copy_(noise / max(1, fan_in) ** 0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * noise)
