"""Sizes of the BLIP models. Start with :class:`NlvrConfig` (image pairs) and :class:`BlipConfig` (the other
tasks).

The constants at the end are the registered sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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

    ``drop_path`` is the stochastic depth rate of the last block; that of the others rises to it linearly from 0. BLIP
    fine-tunes with 0.1.
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
    """Sizes of a text encoder or decoder, a post-norm BERT with cross-attention.

    With cross-attention to two images, layers from ``merge_from_layer`` on merge both outputs by a linear layer, earlier
    ones by their mean.
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


@dataclass(frozen=True)
class BlipConfig:
    """A model of one image and text: retrieval, captions or question answering; the defaults are the published base size.

    Attributes:
        embedding: width in which retrieval compares images and texts.
        encode_id: [ENC], first token of a text that is encoded while looking at an image.
        decode_id: [DEC], first token of a text that is written.
        end_id: [SEP], last token of a text.
        class_id: [CLS], first token of a text that is encoded by itself.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embedding: int = 256
    encode_id: int = 30523
    decode_id: int = 30522
    end_id: int = 102
    class_id: int = 101

    def __post_init__(self) -> None:
        _check_positive("blip", embedding=self.embedding)
        for name in ("encode_id", "decode_id", "end_id", "class_id"):
            if not 0 <= getattr(self, name) < self.text.vocabulary:
                raise ConfigError(
                    f"blip.{name} {getattr(self, name)} lies outside the vocabulary of {self.text.vocabulary}."
                )


VIT_LARGE = VisionConfig(width=1024, depth=24, heads=16, mlp_width=4096)
_VIT_MINI = VisionConfig(image_size=96, patch_size=8, width=128, depth=6, heads=4, mlp_width=512)
_TEXT_MINI = TextConfig(vocabulary=128, positions=40, width=128, depth=4, heads=4, mlp_width=512, dropout=0.0)

BASE = NlvrConfig()
LARGE = NlvrConfig(vision=VIT_LARGE)
MINI = NlvrConfig(vision=_VIT_MINI, text=_TEXT_MINI)

BLIP_BASE = BlipConfig()
BLIP_LARGE = BlipConfig(vision=VIT_LARGE)
BLIP_MINI = BlipConfig(
    vision=_VIT_MINI, text=_TEXT_MINI, embedding=64, encode_id=1, decode_id=126, end_id=127, class_id=125
)
# Captions of scenes are long beside 144 patches: a light decoder, so that 4% of the MACs do not depend on image tokens (in the
# published base size 3%).
CAPTION_MINI = replace(BLIP_MINI, text=replace(_TEXT_MINI, depth=2, mlp_width=128))
# Retrieval encodes texts twice: with a light encoder, 9% of the MACs of a pair are those of its words, as in the base size.
RETRIEVAL_MINI = replace(BLIP_MINI, text=replace(_TEXT_MINI, mlp_width=128))
VQA_BASE = replace(BLIP_BASE, vision=replace(BLIP_BASE.vision, image_size=480))
VQA_LARGE = replace(BLIP_LARGE, vision=replace(BLIP_LARGE.vision, image_size=480))
