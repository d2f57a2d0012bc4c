"""Small models of timm's architectures: the same code with few layers and narrow widths. Start with :func:`build`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from zoo.small.shrink import HEADS, IMAGE, LAYERS, PATCH, WIDTH

_VIT = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
_STAGES = {"img_size": IMAGE, "embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
_HIERADET = {
    "embed_dim": 16,
    "stages": (2, 2, 2, 2),
    "num_heads": 1,
    "window_spec": (4, 4, 2, 2),
    "global_att_blocks": (5,),
    "pretrained_cfg_overlay": {"input_size": (3, IMAGE, IMAGE)},
}

# The first pattern that matches gives the arguments of `timm.create_model`; architectures without one keep their own.
_ARGUMENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("test_*", {}),
    ("swin*_tiny*", {**_STAGES, "window_size": 4}),
    ("vit_base_mci*", {"img_size": IMAGE, "depth": LAYERS}),
    ("vit_small_r26*", {"img_size": IMAGE, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}),
    ("tnt*", {"embed_dim": WIDTH, "inner_dim": 16, "depth": LAYERS, "num_heads_outer": HEADS}),
    ("volo*", {}),
    ("pit*", {"img_size": IMAGE, "patch_size": 8, "stride": 8, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 8)}),
    ("crossvit*", {"embed_dim": (32, 64), "num_heads": (2, 4), "depth": ((1, 1, 0), (1, 1, 0))}),
    ("pvt_v2*", {"depths": (2, 2, 2, 2), "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)}),
    ("twins_pcpvt*", {"img_size": IMAGE, "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 2)}),
    ("twins_svt*", {"embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 2)}),
    ("hiera*", {"embed_dim": 16, "stages": (2, 2, 2, 2), "num_heads": 1}),
    ("hieradet*|sam2_hiera*", _HIERADET),
    ("vitamin*", {"depth": LAYERS}),
    ("coat_lite*", {"embed_dims": (16, 32, 64, 64), "serial_depths": (1, 1, 1, 1)}),
    ("fastvit*", {"layers": (1, 1, 1, 2), "embed_dims": (16, 32, 64, 64)}),
    ("davit*", {"depths": (2, 2, 2, 2), "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)}),
    ("*vit*|deit*|beit*|eva*|aimv2*|cait*|xcit*|convit*|samvit*|naflexvit*|flexivit*", _VIT),
)  # fmt: skip

_OWN = (
    "maxvit* nextvit* shvit* nest* mvitv2* visformer* mixer* gcvit* levit* mobilevit* efficientvit* tiny_vit* repvit*"
).split()


def has(name: str) -> bool:
    """Whether the installed release has an architecture of that name."""
    import timm

    return bool(timm.is_model(name))


def build(name: str) -> nn.Module:
    """Build the architecture of that name, small where its arguments allow it."""
    import timm

    given = arguments(name)
    size = given.get("img_size")  # what example inputs go by where the model itself takes any size
    overlay: dict[str, Any] = {} if size is None else {"pretrained_cfg_overlay": {"input_size": (3, size, size)}}
    return timm.create_model(name, pretrained=False, num_classes=10, **overlay, **given)


def arguments(name: str) -> dict[str, Any]:
    """Return the arguments that make an architecture small; none where it has no such arguments."""
    if any(fnmatchcase(name, pattern) for pattern in _OWN):
        return {}
    for patterns, found in _ARGUMENTS:
        if any(fnmatchcase(name, pattern) for pattern in patterns.split("|")):
            return found
    return {}
