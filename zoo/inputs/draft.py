"""A batch of example inputs in the making: the model, its configuration, and the arguments made so far.

Start with :class:`InputsDraft`. Configurations have several names for the same thing; its properties know all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

TEXT_LENGTH = 16
PADDED = 4
GRID = 8

_SPECIAL = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
)


@dataclass
class InputsDraft:
    """What makers of arguments read and write.

    Attributes:
        model: The model that the inputs are for.
        batch: The number of samples.
        generator: The source of random numbers.
        made: The arguments so far.
        image_tokens: Positions that one sample's images take in its text; 0 where they take none.
    """

    model: nn.Module
    batch: int
    generator: torch.Generator
    made: dict[str, Any] = field(default_factory=dict)
    image_tokens: int = 0

    @cached_property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    @cached_property
    def core(self) -> Any:
        """The configuration of the vision-language model that the model is, or is made around."""
        return first(self.config, "thinker_config", "vlm_config", default=self.config)

    @cached_property
    def vision(self) -> Any:
        """The configuration of the part that reads images."""
        part = first(self.core, "vision_config", "image_config", "vision", "encoder", default=self.core)
        return first(part, "vision_config", default=part)

    @cached_property
    def text(self) -> Any:
        """The configuration of the part that reads text."""
        return first(self.core, "text_config", "decoder", default=self.core)

    @cached_property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """Parameters of the model's forward by name."""
        return dict(inspect.signature(self.model.forward).parameters)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model reads."""
        nested = (getattr(self.vision, name, None) for name in ("backbone_config", "sam_config", "vq_config"))
        for owner in (self.vision, self.config, *nested):
            size = first(owner, "image_size", "img_size", "input_size", "max_img_size", "resolution")
            if size is not None:
                return pair(size)
        return 64, 64

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of one patch."""
        size = first(self.vision, "patch_size") or first(self.config, "patch_size")
        return pair(size if size is not None else self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, where a model takes patches; a multiple of what it merges."""
        names = "spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size"
        merge = pair(first(self.vision, *names, default=1))
        height, width = (max(side, GRID // side * side) for side in merge)
        return height, width

    @property
    def patches(self) -> int:
        """The number of patches of :attr:`grid`."""
        height, width = self.grid
        return height * width

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(first(self.vision, "num_channels", "in_channels", "in_chans") or 3)

    @property
    def length(self) -> int:
        """Length of a text."""
        limit = int(first(self.text, "max_position_embeddings", "n_positions", default=TEXT_LENGTH))
        return min(TEXT_LENGTH, limit) if limit > 0 else TEXT_LENGTH  # -1: any length

    def images(self, *leading: int) -> Tensor:
        """Standard normal images ``[batch, *leading, C, H, W]``."""
        return self.normal(*leading, self.channels, *self.image_size)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal ``[batch, *shape]``."""
        return torch.randn(self.batch, *shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from ``low`` to below ``high``, ``[batch, *shape]``."""
        return torch.randint(low, high, (self.batch, *shape), generator=self.generator)

    def words(self, length: int) -> Tensor:
        """Ids of ordinary tokens ``[batch, length]``."""
        special = set(self._special_ids())
        limit = min(int(self.text.vocab_size), 1000)
        ordinary = torch.tensor([i for i in range(limit) if i not in special])
        return ordinary[self.integers(0, len(ordinary), length)]

    @property
    def image_token(self) -> int | None:
        """The id that stands for a piece of an image."""
        for owner in (self.config, self.core, self.text):
            value = first(
                owner, "image_token_id", "image_token_index", "img_token_id", "image_patch_id", "boi_token_id"
            )
            if isinstance(value, int):
                return value
        return None

    def _special_ids(self) -> Iterator[int]:
        for owner in (self.config, self.core, self.text):
            for name, value in vars(owner).items():
                if isinstance(value, int) and (name in _SPECIAL or name.endswith(("_token_id", "_token_index"))):
                    yield value


def first(owner: Any, *names: str, default: Any = None) -> Any:
    """The first attribute of ``owner`` among ``names`` that is not None."""
    for name in names:
        value = getattr(owner, name, None)
        if value is not None:
            return value
    return default


def pair(size: Any) -> tuple[int, int]:
    """A size as (height, width)."""
    if isinstance(size, int):
        return size, size
    if hasattr(size, "height"):
        return int(size.height), int(size.width)
    values = list(size.values()) if isinstance(size, dict) else list(size)
    height, width = (values[0], values[0]) if len(values) == 1 else values[-2:]
    return int(height), int(width)
