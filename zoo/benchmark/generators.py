"""Models that generate, made to the size that is to be measured, with prompts for them: :func:`open_generator`.

Such a model is a class of transformers that reads an image and words, and that goes on from the key/value cache that a call
returns. Its weights are random.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madtp.errors import ConfigError
from zoo.adapters import find_adapter
from zoo.benchmark.models import CALIBRATION_BATCH, Batch
from zoo.benchmark.pictures import draw_pictures
from zoo.examples import read_config
from zoo.inputs.draft import InputsDraft, first, pair
from zoo.small import enliven, hf, names
from zoo.suggestions import did_you_mean

HF = "hf:"
CACHES = ("cache", "past_key_values")
"""What transformers calls a cache in calls and outputs, the newest name first."""

KNOWN = ("LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration", "Qwen2VLForConditionalGeneration")
"""Some of the classes that generate, to name in messages."""

CALIBRATION_SEED = 1_000_003


@dataclass(frozen=True)
class PromptSize:
    """How long prompts are.

    Attributes:
        text_tokens: words of a prompt.
        image_size: side of the square images in pixels; None for the model's own.
    """

    text_tokens: int
    image_size: int | None = None


@dataclass(frozen=True)
class GeneratingModel:
    """A model that generates, and where its prompts come from.

    Attributes:
        name: as it was asked for.
        dense: in eval mode.
        seed: of weights, pictures and words.
    """

    name: str
    dense: nn.Module
    seed: int

    @property
    def cache_name(self) -> str:
        """What the model's forward calls a cache."""
        return _cache_name(type(self.dense)) or CACHES[0]

    def prompts(self, count: int, size: int, text_tokens: int, *, calibration: bool = False) -> list[Batch]:
        """Return ``count`` different prompts in batches of ``size``; those for calibration are others than those to time.

        All have the same length, so no batch is padded.

        Args:
            count: number of prompts.
            size: prompts in a batch; the last may hold fewer.
            text_tokens: words of a prompt.
            calibration: whether strengths are set by them.
        """
        seed = self.seed + (CALIBRATION_SEED if calibration else 0)
        starts = range(0, count, size)
        made = [self._drawn(min(size, count - start), text_tokens, seed + start) for start in starts]
        for name, value in made[0].items():
            if isinstance(value, Tensor) and value.dim() >= 4 and value.shape[-3] in (1, 3):
                _put_pictures(made, name, seed)
        return made

    def calibration(self, count: int, text_tokens: int) -> list[Batch]:
        """Return prompts to calibrate on, each a call that fills a cache."""
        batches = self.prompts(count, min(CALIBRATION_BATCH, count), text_tokens, calibration=True)
        return [{**batch, "use_cache": True} for batch in batches]

    def image_tokens(self, batch: Batch, text_tokens: int) -> int:
        """Return how many tokens of a prompt stand for its image."""
        return int(batch["input_ids"].shape[1]) - text_tokens

    def _drawn(self, count: int, text_tokens: int, seed: int) -> Batch:
        adapter, generator = find_adapter(self.dense), torch.Generator().manual_seed(seed)
        if adapter is None:
            raise ConfigError(f"{self.name}: the zoo knows no inputs for {type(self.dense).__name__}.")
        given = adapter.example_inputs(self.dense, count, generator)
        draft = InputsDraft(self.dense, count, generator)
        old: Tensor = given["input_ids"]
        end = old.shape[1] - draft.length
        if end < 0 or draft.image_token in old[:, end:].unique().tolist():
            raise ConfigError(f"{self.name} takes prompts that do not end in words, so their length cannot be chosen.")
        words = draft.words(text_tokens)
        longer = {
            name: _longer(value, end, text_tokens)
            for name, value in given.items()
            if isinstance(value, Tensor) and value.shape[:2] == old.shape
        }
        longer["input_ids"] = torch.cat([old[:, :end], words], dim=1)
        if "attention_mask" in given:
            longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        return {**given, **longer}


def _longer(value: Tensor, end: int, count: int) -> Tensor:
    """What runs along a prompt, ``[B, T, ...]``, with what it says of the last word for ``count`` words from ``end`` on."""
    return torch.cat([value[:, :end], value[:, -1:].expand(-1, count, *value.shape[2:])], dim=1)


def _put_pictures(batches: Sequence[Batch], name: str, seed: int) -> None:
    """Replace the noise of an argument by pictures, ``[..., C, H, W]``, of which no two in all batches are alike."""
    counts = [batch[name][..., 0, 0, 0].numel() for batch in batches]
    channels, height, width = batches[0][name].shape[-3:]
    pictures = draw_pictures(sum(counts), (channels, height, width), seed).split(counts)
    for batch, drawn in zip(batches, pictures, strict=True):
        batch[name] = drawn.reshape(batch[name].shape)


def open_generator(
    name: str, seed: int, size: PromptSize, new_tokens: int, fields: Mapping[str, Any] | None = None
) -> GeneratingModel:
    """Build a model that generates, with random weights.

    Args:
        name: ``"hf:"`` and a class of transformers, which is built small, or a ``config.json`` of transformers or its folder.
        seed: of weights, pictures and words.
        size: the longest prompts that it is to take.
        new_tokens: tokens that it is to continue them by.
        fields: fields of the configuration to change, by dotted name: ``{"text_config.num_hidden_layers": 8}``.

    Raises:
        ConfigError: the model does not generate, or its configuration has no such field or size.
        UnknownModelError: there is no such class.
    """
    kind, config = _kind_and_config(name)
    if not generates(kind):
        raise ConfigError(
            f"{name} does not generate from an image and words by a key/value cache. Models that do, such as "
            f"{', '.join(HF + known for known in KNOWN)}, are listed by `madtp bench --generate --list`."
        )
    config = _changed(name, config, dict(fields or {}))
    if size.image_size is not None:
        _resize(name, config, size.image_size)
    if name.startswith(HF):
        _make_room(config, size.text_tokens + new_tokens)
    torch.manual_seed(seed)
    try:
        model: nn.Module = kind(config).eval()
    except Exception as error:  # whatever the model's own code makes of fields that do not fit together
        raise ConfigError(f"{name} cannot be built with this configuration: {type(error).__name__}: {error}") from error
    enliven(model, seed)
    return GeneratingModel(name, model, seed)


def generates(kind: type) -> bool:
    """Whether a class of transformers reads an image and words, and goes on from a key/value cache."""
    if not getattr(kind, "can_generate", lambda: False)():
        return False
    known = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    reads_images = any(word in name for name in known for word in ("pixel", "image"))
    encodes = any(name.startswith("decoder") for name in known)
    return "input_ids" in known and reads_images and _cache_name(kind) is not None and not encodes


def list_generators() -> list[str]:
    """Return the names of the models of the catalogue that generate from an image and words, in its order."""
    library = _transformers()
    kinds = {name: getattr(library, name.removeprefix(HF), None) for name in names([f"{HF}*For*"])}
    return [name for name, kind in kinds.items() if kind is not None and generates(kind)]


def _cache_name(kind: type) -> str | None:
    known = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in CACHES if name in known), None)


def _kind_and_config(name: str) -> tuple[Any, Any]:
    """A class and a configuration for it; that of a class that does not generate is not needed."""
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        config, architecture = read_config(path / "config.json" if path.is_dir() else path)
        if not architecture:
            raise ConfigError(f'{path} names no class; add one that generates as "architectures": ["..."].')
        return getattr(_transformers(), architecture, type(None)), config
    if not name.startswith(HF):
        return type(None), None
    names([name])
    kind = getattr(_transformers(), name.removeprefix(HF), type(None))
    return kind, hf.small_config(kind) if generates(kind) else None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("transformers is not installed; run pip install 'madtp[hf]'.") from error
    return transformers


def _changed(name: str, config: Any, fields: dict[str, Any]) -> Any:
    """A configuration with other fields, which its own class checks."""
    if not fields:
        return config
    content = config.to_dict()
    for path, value in fields.items():
        *outer, last = path.split(".")
        owner: Any = content
        for part in outer:
            owner = owner.get(part) if isinstance(owner, dict) else None
        if not isinstance(owner, dict) or last not in owner:
            advice = did_you_mean(
                path, _paths(content), otherwise="Nested fields have dots, as in text_config.hidden_size."
            )
            raise ConfigError(f"the configuration of {name} has no field {path!r}. {advice}")
        owner[last] = value
    try:
        return type(config).from_dict(content)
    except Exception as error:
        raise ConfigError(f"the configuration of {name} does not take {json.dumps(fields)}: {error}") from error


def _paths(content: Mapping[str, Any], before: str = "") -> list[str]:
    """Dotted names of all fields."""
    found = []
    for name, value in content.items():
        found += [f"{before}{name}", *(_paths(value, f"{before}{name}.") if isinstance(value, dict) else ())]
    return found


def _resize(name: str, config: Any, side: int) -> None:
    """Set the side of the images that a configuration is for."""
    vision = first(config, "vision_config", default=config)
    old = getattr(vision, "image_size", None)
    patch = getattr(vision, "patch_size", None)
    if old is None:
        raise ConfigError(f"the configuration of {name} has no image size, so leave out --image-size.")
    if patch is not None and any(side % edge for edge in pair(patch)):
        raise ConfigError(
            f"images of {side} pixels are not made of whole patches of {pair(patch)[0]}; choose a multiple."
        )
    vision.image_size = side if isinstance(old, int) else [side] * len(old)


def _make_room(config: Any, tokens: int) -> None:
    """Let a small configuration take texts of so many tokens behind its image: those of the catalogue are for short ones."""
    vision, text = first(config, "vision_config", default=config), first(config, "text_config", default=config)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if side is not None and patch is not None:
        tokens += 2 + (pair(side)[0] // pair(patch)[0]) * (pair(side)[1] // pair(patch)[1])
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < tokens:
        text.max_position_embeddings = tokens
