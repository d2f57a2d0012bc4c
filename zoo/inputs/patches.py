"""Makers for models that take images as patches, as tiles of a larger picture, or as frames of a clip.

Families name them in ``families.py``. What a model counts as one place of its text follows from the grid of patches that
:class:`~zoo.inputs.draft.InputsDraft` chooses.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from zoo.inputs.arguments import input_ids
from zoo.inputs.draft import InputsDraft, first

FRAMES = 4


def frames(draft: InputsDraft) -> Tensor:
    """A clip of as many frames as the model counts: ``[B, frames, C, H, W]``."""
    return draft.images(int(first(draft.vision, "num_frames", default=FRAMES)))


def tiles(draft: InputsDraft) -> Tensor:
    """The whole image and the tiles that its model cuts an image of this size into: ``[B, 1 + tiles, C, H, W]``."""
    count = getattr(sys.modules[type(draft.model).__module__], "image_size_to_num_patches", None)
    pinpoints = first(draft.config, "image_grid_pinpoints")
    if count is None or pinpoints is None:
        return draft.images(2)
    sides = [list(pinpoint) for pinpoint in pinpoints]
    return draft.images(int(count(list(draft.image_size), sides, draft.image_size[0])))


def square_patches(draft: InputsDraft) -> Tensor:
    """Patches of all images, each an image of its own: ``[B * N, C, P, P]``."""
    return draft.normal(draft.patches, draft.channels, *draft.patch_size).flatten(0, 1)


def strip(draft: InputsDraft) -> Tensor:
    """Patches of all images beside each other in one strip: ``[1, C, P, B * N * P]``."""
    height, width = draft.patch_size
    return torch.cat(list(draft.normal(draft.channels, height, draft.patches * width)), dim=-1)[None]


def blocks(draft: InputsDraft) -> Tensor:
    """Blocks of patches that become one token each, channels last: [blocks of all images, rows, columns, C]."""
    (height, width), merge = draft.patch_size, int(first(draft.vision, "spatial_merge_size", default=1))
    count = draft.patches // merge**2
    return draft.normal(count, merge * height, merge * width, draft.channels).flatten(0, 1)


def grid_of_blocks(draft: InputsDraft) -> Tensor:
    """Frames, rows and columns of each image's blocks: ``[B, 3]``."""
    merge = int(first(draft.vision, "spatial_merge_size", default=1))
    return torch.tensor([[1, *(side // merge for side in draft.grid)]]).repeat(draft.batch, 1)


def large_patches(draft: InputsDraft) -> Tensor:
    """Flattened patches of as many pixels as become one token: ``[B, N, pixels * C]``."""
    (height, width), pooled = draft.patch_size, int(draft.vision.pooling_kernel_size)
    return draft.normal(draft.patches, draft.channels * height * width * pooled**2)


def moving_patches(draft: InputsDraft) -> Tensor:
    """Patches with their frames, channels last: ``[16 of each image, frames, P, P, C]``."""
    depth = int(draft.vision.temporal_patch_size)
    return draft.normal(16, depth, *draft.patch_size, draft.channels).flatten(0, 1)


def patches_by_sample(draft: InputsDraft) -> Tensor:
    """Flattened patches ``[B, N, C * frames * P * P]``."""
    (height, width), depth = draft.patch_size, int(first(draft.vision, "temporal_patch_size", default=1))
    return draft.normal(draft.patches, draft.channels * depth * height * width)


def patch_positions(draft: InputsDraft) -> Tensor:
    """Column and row of each patch: ``[B, N, 2]``."""
    rows, columns = draft.grid
    places = torch.stack([torch.arange(columns).repeat(rows), torch.arange(rows).repeat_interleave(columns)], dim=-1)
    return places.expand(draft.batch, -1, -1).clone()


def ids_of_merged(draft: InputsDraft) -> Tensor | None:
    """Ids after a slot for each merged block of patches: ``[B, T]``."""
    merge = int(first(draft.vision, "spatial_merge_size", default=1))
    return ids_after_image(draft, draft.patches // merge**2)


def ids_after_image(draft: InputsDraft, slots: int, token: int | None = None) -> Tensor | None:
    """Ids after ``slots`` image slots, which hold the id ``token``: ``[B, T]``."""
    draft.image_tokens = slots
    ids = input_ids(draft)
    token = (draft.image_token or 0) if token is None else token
    return None if ids is None else torch.cat([torch.full((draft.batch, slots), token), ids], dim=1)


def pooled_patches(draft: InputsDraft) -> Tensor:
    """The four patches of each pooled token, numbered within its image: [tokens of all images, 4]."""
    rows, columns = (side // draft.patch_size[0] for side in draft.image_size)
    numbers = torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2).transpose(1, 2).reshape(-1, 4)
    return numbers.repeat(draft.batch, 1)


def pooled_grid(draft: InputsDraft) -> Tensor:
    """Rows and columns of pooled tokens, and none of a second resolution: ``[B, 4]``."""
    rows, columns = (side // draft.patch_size[0] // 2 for side in draft.image_size)
    return torch.tensor([[rows, columns, 0, 0]]).repeat(draft.batch, 1)
