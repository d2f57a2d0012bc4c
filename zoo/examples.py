"""Example inputs for models that the zoo knows, and models found by name or by configuration file.

:func:`example_inputs` looks at a model and makes a small valid batch for it; :func:`find_model` builds an untrained
model from a zoo name, a timm name or a transformers configuration. Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from madtp.errors import ConfigError, ExampleInputsError, UnknownModelError
from madtp.files.json_text import read_description
from madtp.files.limits import shown
from zoo.adapters import find_adapter
from zoo.builders import build_own, names_builder
from zoo.registry import create, list_models
from zoo.suggestions import did_you_mean

_SEED = 0
_CONFIG_FILE = "config.json"
_HUB_ID = re.compile(r"(hf:)?[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class FoundModel:
    """An untrained model in eval mode.

    Attributes:
        name: What it was found by.
        origin: Where it came from: "zoo", "timm", "transformers", or "function".
        model: The model.
        example_inputs: Keyword arguments, or positional ones, to trace it with.
    """

    name: str
    origin: str
    model: nn.Module
    example_inputs: Mapping[str, Any] | tuple[Any, ...]


def find_model(name: str) -> FoundModel:
    """Build the model behind a name.

    Args:
        name: Of the zoo; of timm, ``timm:`` in front if you like; a transformers ``config.json`` or a folder that holds one; or
            ``module:function`` (see :mod:`zoo.builders`).

    Raises:
        UnknownModelError: There is nothing of that name; the message lists near matches.
        ConfigError: The configuration file is unreadable or of a kind that transformers does not know, or a function fails.
    """
    if names_builder(name):
        own, inputs = build_own(name)
        return FoundModel(name, "function", own, example_inputs(own) if inputs is None else inputs)
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        model, origin = _from_transformers_config(path / _CONFIG_FILE if path.is_dir() else path), "transformers"
    elif name in list_models():
        model, origin = create(name), "zoo"
    else:
        model, origin = _from_timm(name.removeprefix("timm:")), "timm"
    model = model.eval()
    return FoundModel(name=name, origin=origin, model=model, example_inputs=example_inputs(model))


def list_timm_models(pattern: str = "") -> list[str]:
    """Names of timm's architectures that match the shell-style ``pattern`` (all when empty), sorted."""
    import timm

    return sorted(timm.list_models(pattern))


def example_inputs(model: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Return a valid batch of keyword arguments for a model of the zoo, of timm or of transformers.

    Token ids are [batch, 16] and valid throughout, images standard normal at the model's own size.

    Raises:
        ExampleInputsError: The model is of another kind, or needs an argument that cannot be made up.
    """
    adapter = find_adapter(model)
    if adapter is not None:
        return adapter.example_inputs(model, batch, torch.Generator().manual_seed(_SEED))
    raise ExampleInputsError(
        f"{type(model).__name__} (of {type(model).__module__}) is not a model that the zoo knows inputs for; "
        "pass example_inputs, a dict of the keyword arguments or a tuple of the positional ones, with a batch of 2 or more."
    )


def example_inputs_of(model: nn.Module) -> dict[str, Any] | None:
    """Return :func:`example_inputs`, or None for a model of a kind that the zoo does not know."""
    return None if find_adapter(model) is None else example_inputs(model)


def _from_timm(name: str) -> nn.Module:
    import timm

    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise UnknownModelError(
            f"{name!r} names a model to be downloaded; give a timm architecture such as 'vit_base_patch16_224'."
        )
    if _HUB_ID.fullmatch(name):
        raise UnknownModelError(
            f"there is no folder {name!r}. If it is the id of a model on a hub: nothing is downloaded here. Give the path of "
            f"its config.json; or rewrite it in Python: madtp.rewrite(AutoModel.from_pretrained({name!r}), inputs)."
        )
    if timm.is_model(name.partition(".")[0]):
        try:
            return timm.create_model(name, pretrained=False)
        except RuntimeError as error:  # an unknown pretrained tag
            raise UnknownModelError(f"timm knows no weights tag of {name!r}: {error}") from error
    known = [*list_models(), *timm.list_models()]
    advice = did_you_mean(name, known, otherwise="`madtp models` lists the names.", cutoff=0.6)
    raise UnknownModelError(
        f"{name!r} is neither a model of the zoo or of timm nor a folder or .json file with a transformers configuration. "
        f"{advice}"
    )


def _from_transformers_config(path: Path) -> nn.Module:
    config, architecture = read_config(path)
    import transformers

    make: Callable[[Any], nn.Module] = getattr(transformers, architecture, transformers.AutoModel.from_config)
    return make(config)


def read_config(path: Path) -> tuple[Any, str]:
    """Read a configuration of transformers.

    Returns:
        The configuration, and the name of the first class that it names for itself; empty where it names none.

    Raises:
        ConfigError: The file is unreadable or of a kind that transformers does not know, or there is no transformers.
    """
    try:
        content = read_description(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give a transformers config.json or its folder."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError(f"{path} has no 'model_type', so it is not a configuration of transformers.")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("transformers is not installed; run pip install 'madtp[hf]'.") from error
    known = transformers.CONFIG_MAPPING
    model_type, architectures = content.pop("model_type"), content.get("architectures") or [""]
    if not isinstance(model_type, str) or model_type not in known:
        advice = did_you_mean(
            shown(model_type), known.keys(), otherwise="Correct it, or install a newer release.", cutoff=0.6
        )
        raise ConfigError(
            f"{path}: transformers {transformers.__version__} knows no model type {shown(model_type)}. {advice}"
        )
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise ConfigError(
            f"{path}: 'architectures' is {shown(architectures)}; it has to be a list of names of classes."
        )
    try:
        return known[model_type].from_dict(content), architectures[0]
    except Exception as error:  # whatever the class makes of fields of another type
        raise ConfigError(f"{path} is no configuration of {model_type}: {type(error).__name__}: {error}") from error
