"""Sizes of a BLIP-NLVR model. Start with `NlvrConfig`; `BASE` and `MINI` are the two registered sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from madtp.errors import ConfigError


def _check_positive(owner: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{owner}.{name} is {size}; it must be at least 1.")


def _check_heads(owner: str, width: int, heads: int) -> None:
    if width % heads:
        raise ConfigError(f"{owner}.width {width} is not a multiple of {owner}.heads {heads}.")


def _check_rate(owner: str, name: str, rate: float) -> None:
    if not 0.0 <= rate < 1.0:
        raise ConfigError(f"{owner}.{name} is {rate}; a dropout rate lies in [0, 1).")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower, a pre-norm ViT with class token.

    `drop_path` is the stochastic depth rate of the last block, rising linearly from 0 (BLIP fine-tunes with 0.1).
    """

    image_size: int = 384
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(
            "vision",
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_width=self.mlp_width,
        )
        _check_heads("vision", self.width, self.heads)
        _check_rate("vision", "drop_path", self.drop_path)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size {self.image_size} is not a multiple of the patch size {self.patch_size}."
            )

    @property
    def tokens(self) -> int:
        """Tokens of one image, class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder, a post-norm BERT with twin cross-attention.

    Layers from `merge_from_layer` on merge the twin cross-attention outputs by a linear layer, earlier ones by
    their mean.
    """

    vocabulary: int = 30524
    positions: int = 512
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.1
    merge_from_layer: int = 6
    pad_id: int = 0

    def __post_init__(self) -> None:
        _check_positive(
            "text",
            vocabulary=self.vocabulary,
            positions=self.positions,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_width=self.mlp_width,
        )
        _check_heads("text", self.width, self.heads)
        _check_rate("text", "dropout", self.dropout)
        if not 0 <= self.pad_id < self.vocabulary:
            raise ConfigError(f"text.pad_id {self.pad_id} lies outside the vocabulary of {self.vocabulary}.")


@dataclass(frozen=True)
class NlvrConfig:
    """A whole BLIP-NLVR model; the defaults are the published base size."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)


BASE = NlvrConfig()

MINI = NlvrConfig(
    vision=VisionConfig(image_size=96, patch_size=8, width=128, depth=6, heads=4, mlp_width=512),
    text=TextConfig(vocabulary=128, positions=40, width=128, depth=4, heads=4, mlp_width=512, dropout=0.0),
)
