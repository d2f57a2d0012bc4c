"""Example inputs for models that the zoo knows, and models found by name or by configuration file.

:func:`example_inputs` looks at a model and makes a small valid batch for it; :func:`find_model` builds an untrained
model from a zoo name, a timm name or a transformers configuration. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madtp.errors import ConfigError, ExampleInputsError, UnknownModelError
from zoo.registry import create, list_models

TEXT_LENGTH = 16
_SEED = 0
_CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class FoundModel:
    """An untrained model in eval mode, inputs to trace it with, and where it came from ("zoo", "timm", ...)."""

    name: str
    origin: str
    model: nn.Module
    example_inputs: dict[str, Tensor]


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


def example_inputs(model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    """A valid batch of keyword arguments for a model of the zoo, of timm or of transformers.

    Token ids are [batch, 16] and valid throughout, images standard normal at the model's own size.

    Raises:
        ExampleInputsError: the model is of another kind, or needs an argument that cannot be made up.
    """
    library = type(model).__module__.partition(".")[0]
    generator = torch.Generator().manual_seed(_SEED)
    if library == "zoo":
        return _zoo_inputs(model, batch, generator)
    if library == "timm":
        size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
        return {"x": torch.randn(batch, *size, generator=generator)}
    if library == "transformers":
        return _transformers_inputs(model, batch, generator)
    raise ExampleInputsError(
        f"{type(model).__name__} (of {type(model).__module__}) is none of the models that the zoo knows inputs for; "
        "pass example_inputs, a dict of the keyword arguments or a tuple of the positional ones, with a batch of 2 or more."
    )


def example_inputs_of(model: nn.Module) -> dict[str, Tensor] | None:
    """:func:`example_inputs`, or None where the model is of a kind that the zoo does not know."""
    library = type(model).__module__.partition(".")[0]
    return example_inputs(model) if library in ("zoo", "timm", "transformers") else None


def _zoo_inputs(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    from zoo.blip.nlvr import BlipNlvr

    if not isinstance(model, BlipNlvr):
        raise ExampleInputsError(f"the zoo has no example inputs for {type(model).__name__}; pass example_inputs.")
    side, text = model.config.vision.image_size, model.config.text
    length = min(TEXT_LENGTH, text.positions)
    return {
        "images": torch.randn(batch, 2, 3, side, side, generator=generator),
        "input_ids": torch.randint(1, text.vocabulary, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


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


def _transformers_inputs(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    config: Any = model.config
    arguments = inspect.signature(model.forward).parameters
    vision, text = getattr(config, "vision_config", None) or config, getattr(config, "text_config", None) or config
    made: dict[str, Tensor] = {}
    patches = 0
    if "pixel_values" in arguments:
        height, width = _pair(getattr(vision, "image_size", None) or 224)
        made["pixel_values"] = torch.randn(
            batch, getattr(vision, "num_channels", 3), height, width, generator=generator
        )
        patch = _pair(getattr(vision, "patch_size", None) or height)
        patches = (height // patch[0]) * (width // patch[1])
    if "input_ids" in arguments and getattr(text, "vocab_size", None):
        ids = _token_ids(config, text, batch, patches, generator)
        made["input_ids"] = ids
        if "attention_mask" in arguments:
            made["attention_mask"] = torch.ones_like(ids)
    missing = [
        name
        for name, parameter in arguments.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and name not in made
    ]
    if missing or not made:
        wanted = ", ".join(missing) or "arguments other than input_ids and pixel_values"
        raise ExampleInputsError(
            f"{type(model).__name__} needs {wanted}, for which no example can be made up; pass example_inputs."
        )
    return made


def _token_ids(config: Any, text: Any, batch: int, patches: int, generator: torch.Generator) -> Tensor:
    """Random ordinary ids [batch, T], ended by the end-of-text id; image placeholders first where the model wants them."""
    limit = int(getattr(text, "max_position_embeddings", None) or TEXT_LENGTH)
    length = min(TEXT_LENGTH, limit)
    special = set(_special_ids(config, text))
    ordinary = torch.tensor([i for i in range(min(text.vocab_size, 1000)) if i not in special])
    ids = ordinary[torch.randint(len(ordinary), (batch, length), generator=generator)]
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[:, -1] = end
    placeholder = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if placeholder is None or not patches:
        return ids
    return torch.cat([torch.full((batch, patches), int(placeholder)), ids], dim=1)


def _special_ids(config: Any, text: Any) -> Iterator[int]:
    for owner in (config, text):
        for field in (
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "sep_token_id",
            "image_token_id",
            "image_token_index",
        ):
            value = getattr(owner, field, None)
            if isinstance(value, int):
                yield value


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(height), int(width)
