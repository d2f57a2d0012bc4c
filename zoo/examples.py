"""Example inputs for models that the zoo knows, and models found by name or by configuration file.

:func:`example_inputs` looks at a model and makes a small valid batch for it; :func:`find_model` builds an untrained
model from a zoo name, a timm name or a transformers configuration. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from madtp.errors import ConfigError, ExampleInputsError, UnknownModelError
from zoo.adapters import find_adapter
from zoo.registry import create, list_models

_SEED = 0
_CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class FoundModel:
    """An untrained model in eval mode, inputs to trace it with, and where it came from ("zoo", "timm", ...)."""

    name: str
    origin: str
    model: nn.Module
    example_inputs: dict[str, Any]


def find_model(name: str) -> FoundModel:
    """Build the model behind a zoo name, a timm name, a transformers `config.json` or a folder that holds one.

    Raises:
        UnknownModelError: nothing of that name; the message lists near matches.
        ConfigError: the configuration file is unreadable or of a kind that transformers does not know.
    """
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        model, origin = _from_transformers_config(path / _CONFIG_FILE if path.is_dir() else path), "transformers"
    elif name in list_models():
        model, origin = create(name), "zoo"
    else:
        model, origin = _from_timm(name), "timm"
    model = model.eval()
    return FoundModel(name=name, origin=origin, model=model, example_inputs=example_inputs(model))


def list_timm_models(pattern: str = "") -> list[str]:
    """Names of timm's architectures that match the shell-style `pattern` (all when empty), sorted."""
    import timm

    return sorted(timm.list_models(pattern))


def example_inputs(model: nn.Module, batch: int = 2) -> dict[str, Any]:
    """A valid batch of keyword arguments for a model of the zoo, of timm or of transformers.

    Token ids are [batch, 16] and valid throughout, images standard normal at the model's own size.

    Raises:
        ExampleInputsError: the model is of another kind, or needs an argument that cannot be made up.
    """
    adapter = find_adapter(model)
    if adapter is not None:
        return adapter.example_inputs(model, batch, torch.Generator().manual_seed(_SEED))
    raise ExampleInputsError(
        f"{type(model).__name__} (of {type(model).__module__}) is none of the models that the zoo knows inputs for; "
        "pass example_inputs, a dict of the keyword arguments or a tuple of the positional ones, with a batch of 2 or more."
    )


def example_inputs_of(model: nn.Module) -> dict[str, Any] | None:
    """:func:`example_inputs`, or None where the model is of a kind that the zoo does not know."""
    return None if find_adapter(model) is None else example_inputs(model)


def _from_timm(name: str) -> nn.Module:
    import timm

    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise UnknownModelError(
            f"{name!r} names a model to be downloaded; give a timm architecture such as 'vit_base_patch16_224'."
        )
    if timm.is_model(name.partition(".")[0]):
        try:
            return timm.create_model(name, pretrained=False)
        except RuntimeError as error:  # an unknown pretrained tag
            raise UnknownModelError(f"timm knows no weights tag of {name!r}: {error}") from error
    known = [*list_models(), *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    advice = f"Did you mean {' or '.join(map(repr, near))}?" if near else "`madtp models` lists the names."
    raise UnknownModelError(
        f"{name!r} is no model of the zoo or of timm, and no folder or .json file with a transformers configuration. {advice}"
    )


def _from_transformers_config(path: Path) -> nn.Module:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give a transformers config.json or its folder."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError(f"{path} has no 'model_type', so it is no transformers configuration.")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("transformers is not installed; run pip install 'madtp[hf]'.") from error
    known = transformers.CONFIG_MAPPING
    model_type = content.pop("model_type")
    if model_type not in known:
        near = difflib.get_close_matches(model_type, list(known.keys()), n=3)
        advice = f" Near: {', '.join(near)}." if near else ""
        raise ConfigError(
            f"{path}: transformers {transformers.__version__} knows no model type {model_type!r}.{advice}"
        )
    config = known[model_type].from_dict(content)
    architecture = (content.get("architectures") or [""])[0]
    if hasattr(transformers, architecture):
        return getattr(transformers, architecture)(config)
    return transformers.AutoModel.from_config(config)
