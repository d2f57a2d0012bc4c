"""Sizes of the CLIP models. Start with :class:`ClipConfig`; the constants at the end are the registered sizes."""

from __future__ import annotations

from dataclasses import dataclass

from madtp.errors import ConfigError


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of one tower, a pre-norm transformer whose feed-forward layers are four times as wide."""

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ConfigError(
                f"a tower of width {self.width}, depth {self.depth} and {self.heads} heads: all have to be at least 1, and the "
                "width a multiple of the heads."
            )


@dataclass(frozen=True)
class ClipConfig:
    """A whole CLIP model.

    Attributes:
        embedding: The width in which images and texts are compared.
        image_size: Height and width of an image, in pixels.
        patch_size: Height and width of a patch, in pixels.
        vision: Sizes of the vision tower.
        text: Sizes of the text tower.
        vocabulary: The number of ids; the highest ends a text.
        positions: The length of the longest text.
    """

    embedding: int
    image_size: int
    patch_size: int
    vision: TowerConfig
    text: TowerConfig
    vocabulary: int = 49408
    positions: int = 77

    def __post_init__(self) -> None:
        if min(self.embedding, self.image_size, self.patch_size, self.vocabulary, self.positions) < 1:
            raise ConfigError(f"{self}: all sizes have to be at least 1.")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the patch size {self.patch_size}.")

    @property
    def image_tokens(self) -> int:
        """Tokens of one image, class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


VIT_B16 = ClipConfig(512, 224, 16, TowerConfig(768, 12, 12), TowerConfig(512, 12, 8))
VIT_L14_336 = ClipConfig(768, 336, 14, TowerConfig(1024, 24, 16), TowerConfig(768, 12, 12))
MINI = ClipConfig(64, 96, 8, TowerConfig(128, 6, 4), TowerConfig(128, 4, 4), vocabulary=128, positions=40)
