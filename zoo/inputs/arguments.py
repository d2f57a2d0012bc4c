"""Makers of single arguments, by the argument's name: pixel_values, input_ids, bbox, visual_embeds ...

Start with :func:`make_inputs`. A maker takes the :class:`~zoo.inputs.draft.InputsDraft` and returns the argument, or None to
leave it out. Families replace some makers by their own (``families.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from madtp.errors import ExampleInputsError
from zoo.inputs.draft import PADDED, InputsDraft, first, pair

Maker = Callable[[InputsDraft], Any]


def make_inputs(
    model: nn.Module, batch: int, generator: torch.Generator, makers: Mapping[str, Maker | None] | None = None
) -> dict[str, Any]:
    """Make a valid batch of keyword arguments for a model with a configuration.

    Args:
        model: A model with an attribute ``config``.
        batch: The number of samples.
        generator: The source of random numbers.
        makers: By argument; they take the place of the common ones, and None leaves an argument out.

    Raises:
        ExampleInputsError: An argument without a default has no maker.
    """
    draft = InputsDraft(model, batch, generator)
    table: dict[str, Maker | None] = {**COMMON, **(makers or {})}
    for name, maker in table.items():
        if maker is None or name not in draft.arguments:
            continue
        value = maker(draft)
        if value is not None:
            draft.made[name] = value
    _check(draft)
    return draft.made


def _check(draft: InputsDraft) -> None:
    skipped = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = [
        name
        for name, parameter in draft.arguments.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in skipped and name not in draft.made
    ]
    if missing or not draft.made:
        wanted = ", ".join(missing) or "arguments other than the usual ones"
        raise ExampleInputsError(
            f"{type(draft.model).__name__} needs {wanted}, for which no example can be made up; pass example_inputs."
        )


def pixel_values(draft: InputsDraft) -> Tensor:
    """Images ``[B, C, H, W]``; flattened patches where the model wants them with their grid, or with their shapes; clips
    ``[B, frames, C, H, W]`` where it counts frames."""
    if "image_grid_thw" in draft.arguments:
        return _patches_of_all(draft)
    if "spatial_shapes" in draft.arguments:
        height, width = draft.patch_size
        return draft.normal(draft.patches, height * width * draft.channels)
    frames = first(draft.vision, "num_frames")
    return draft.images(*([int(frames)] if isinstance(frames, int) and "Video" in type(draft.model).__name__ else []))


def _patches_of_all(draft: InputsDraft) -> Tensor:
    """Patches of all images in one sequence: ``[B * N, C * frames * P * P]``."""
    height, width = draft.patch_size
    frames = int(first(draft.vision, "temporal_patch_size", "patch_temporal", default=1))
    return draft.normal(draft.patches, draft.channels * frames * height * width).flatten(0, 1)


def grid(draft: InputsDraft) -> Tensor:
    """Frames, rows and columns of each image's patches: ``[B, 3]``."""
    return torch.tensor([[1, *draft.grid]]).repeat(draft.batch, 1)


def sizes(draft: InputsDraft) -> Tensor | None:
    """Height and width of each image: ``[B, 2]``."""
    return torch.tensor([draft.image_size]).repeat(draft.batch, 1) if "pixel_values" in draft.made else None


def shapes(draft: InputsDraft) -> Tensor:
    """Rows and columns of each image's patches: ``[B, 2]``."""
    return torch.tensor([draft.grid]).repeat(draft.batch, 1)


def every_patch(draft: InputsDraft) -> Tensor | None:
    """Every patch is part of the image: ``[B, N]``."""
    return torch.ones(draft.batch, draft.patches, dtype=torch.long) if "spatial_shapes" in draft.arguments else None


def second_view(draft: InputsDraft) -> Tensor | None:
    """The image once more, larger: ``[B, C, H, W]``."""
    config = first(draft.config, "high_res_vision_config")
    return None if config is None else draft.normal(draft.channels, *pair(config.image_size))


def videos(draft: InputsDraft) -> Tensor | None:
    """Clips ``[B, frames, C, H, W]`` for a model that takes nothing else."""
    if draft.arguments["pixel_values_videos"].default is not inspect.Parameter.empty:
        return None
    return draft.images(int(first(draft.vision, "num_frames", "frames_per_clip", default=4)))


def count_image_tokens(draft: InputsDraft) -> int:
    """Return how many positions of the text one sample's images take: the number of their features."""
    owners = [part for part in draft.model.modules() if hasattr(part, "get_image_features")]
    if draft.image_token is None or not owners:
        return 0
    features: Any = owners[-1].get_image_features  # what is wrapped takes every argument; a wrapper may not
    accepted = inspect.signature(features).parameters
    with torch.no_grad():
        found = features(**{name: value for name, value in draft.made.items() if name in accepted})
    deep = first(found, "deepstack_features")
    found = first(found, "pooler_output", "last_hidden_state", default=deep[0][1] if deep else found)
    parts = found if isinstance(found, list | tuple) else [found]
    count: int = sum(part.numel() // part.shape[-1] for part in parts)
    return count // draft.batch


def input_ids(draft: InputsDraft) -> Tensor | None:
    """Image placeholders, then random ordinary ids ended by the end-of-text id: ``[B, T]``. The last sample ends early."""
    if not getattr(draft.text, "vocab_size", None):
        return None
    ids = draft.words(draft.length)
    end, pad = first(draft.text, "eos_token_id"), first(draft.text, "pad_token_id", default=0)
    short = draft.length - PADDED if padded(draft) else draft.length
    if isinstance(end, int) and 0 <= end < draft.text.vocab_size:
        ids[:-1, -1] = end
        ids[-1, short - 1] = end
    if short < draft.length and isinstance(pad, int):
        ids[-1, short:] = max(pad, 0)
    if draft.image_tokens or "pixel_values" not in draft.made:  # a family has counted already, or there is no image
        return ids
    draft.image_tokens = count_image_tokens(draft)
    places = torch.full((draft.batch, draft.image_tokens), draft.image_token or 0)
    return torch.cat([places, ids], dim=1)


def padded(draft: InputsDraft) -> bool:
    """Whether the text of the last sample is shorter than the others'."""
    return "attention_mask" in draft.arguments and draft.length > 2 * PADDED


def attention_mask(draft: InputsDraft) -> Tensor | None:
    """Ones ``[B, T]``, zeros behind the last sample's text."""
    ids = draft.made.get("input_ids")
    if ids is None:
        return None
    mask = torch.ones_like(ids)
    if padded(draft):
        mask[-1, -PADDED:] = 0
    return mask


def decoder_input_ids(draft: InputsDraft) -> Tensor | None:
    """Ordinary ids ``[B, T / 2]`` for the decoder of an encoder-decoder."""
    return draft.words(max(2, draft.length // 2))


def bbox(draft: InputsDraft) -> Tensor | None:
    """A box (left, top, right, bottom) for each token ``[B, T, 4]``, on a grid of a thousand."""
    ids = draft.made.get("input_ids")
    if ids is None:
        return None
    limit = int(first(draft.config, "max_2d_position_embeddings", default=1000))
    corners = draft.integers(0, limit // 2, ids.shape[1], 2)
    return torch.cat([corners, corners + draft.integers(0, limit // 2, ids.shape[1], 2)], dim=-1)


def ones_like_image(draft: InputsDraft) -> Tensor | None:
    """Every pixel is part of the image: ``[B, H, W]``."""
    images = draft.made.get("pixel_values")
    return None if images is None else torch.ones(draft.batch, *images.shape[-2:], dtype=torch.long)


def _regions(draft: InputsDraft, field: str) -> Tensor:
    return draft.normal(36, int(getattr(draft.config, field)))


def image_token_types(draft: InputsDraft) -> Tensor | None:
    """1 where a token stands for a piece of an image, else 0: ``[B, T]``."""
    ids = draft.made.get("input_ids")
    return None if ids is None or draft.image_token is None else (ids == draft.image_token).long()


# In the order of making: images come before the text that holds their places.
COMMON: dict[str, Maker | None] = {
    "pixel_values": pixel_values,
    "high_res_pixel_values": second_view,
    "pixel_values_videos": videos,
    "image_grid_thw": grid,
    "target_sizes": None,  # of families, made before the text
    "image_position_ids": None,  # of families, made before the text as well
    "image_token_pooling": None,
    "image_grids": None,
    "image_merge_sizes": lambda draft: torch.full((draft.batch,), 2),
    "image_sizes": sizes,
    "spatial_shapes": shapes,
    "pixel_attention_mask": every_patch,
    "pixel_mask": ones_like_image,
    "visual_feats": lambda draft: _regions(draft, "visual_feat_dim"),
    "visual_pos": lambda draft: torch.rand(draft.batch, 36, 4, generator=draft.generator),
    "visual_embeds": lambda draft: _regions(draft, "visual_embedding_dim"),
    "visual_attention_mask": lambda draft: torch.ones(draft.batch, 36, dtype=torch.long),
    "visual_token_type_ids": lambda draft: torch.ones(draft.batch, 36, dtype=torch.long),
    "input_ids": input_ids,
    "attention_mask": attention_mask,
    "mm_token_type_ids": image_token_types,
    "bbox": bbox,
    "decoder_input_ids": decoder_input_ids,
}
