"""Further forms of a batch of example inputs, as published models take them: several images a sample, clips of several frames.

Start at :func:`further_inputs`. Models of one kind differ in where images stand among the arguments, so that several ways are
tried out; one counts if the model takes it and its output depends on the image that was added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.inputs.draft import InputsDraft, first

Inputs = Mapping[str, Any]

VIDEO_NAMES = {
    "pixel_values": "pixel_values_videos",
    "image_grid_thw": "video_grid_thw",
    "target_sizes": "target_sizes_videos",
    "image_merge_sizes": "video_merge_sizes",
}
"""What the arguments of images are called where they are clips."""

VIDEO_TYPE = 2
"""What stands for a piece of a clip in the types of tokens, where a piece of an image is 1."""


def further_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """Return the further forms of inputs that a model takes, by name: ``"two images"``, ``"clip"``.

    Args:
        model: In eval mode.
        inputs: A batch with one image a sample, in which image tokens stand before the words.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        return {}
    found = {}
    forms: Mapping[str, Callable[[nn.Module, Inputs, Tensor], Iterator[Inputs]]] = {
        "two images": _two_images,
        "clip": _clips,
    }
    for name, ways in forms.items():
        taken = next((one for one in ways(model, inputs, ids) if _depends_on_the_second(model, one, len(ids))), None)
        if taken is not None:
            found[name] = taken
    return found


def _two_images(model: nn.Module, inputs: Inputs, ids: Tensor) -> Iterator[Inputs]:
    """Batches in which each sample has the image of the next sample, too."""
    token = InputsDraft(model, len(ids), torch.Generator()).image_token
    if token is None or not bool((ids == token).any(1).all()):
        return
    end = int((ids == token).nonzero()[:, 1].max()) + 1
    # Where each image has its size or its grid, the first axis counts images; else it counts samples if it can.
    sized = any(isinstance(x, Tensor) and x.dim() == 2 and not _runs_along(x, ids) for x in inputs.values())
    for further in (0, 1):  # a token behind the image may belong to it
        for join in (_behind, _beside) if sized else (_beside, _behind):
            yield {
                name: torch.cat([x[:, : end + further], x], 1) if _runs_along(x, ids) else join(x, len(ids))
                for name, x in inputs.items()
            }


def _behind(value: Any, size: int) -> Any:
    """What each sample has ``[B * n, ...]``, and what the next one has, behind each other: ``[B * 2 n, ...]``."""
    if not isinstance(value, Tensor) or not value.dim() or len(value) % size:
        return value
    own = value.unflatten(0, (size, -1))
    return torch.cat([own, own.roll(1, 0)], 1).flatten(0, 1)


def _beside(value: Any, size: int) -> Any:
    """What each sample has ``[B, n, ...]``, and what the next one has: ``[B, 2 n, ...]``."""
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != size:
        return value
    return torch.cat([value, value.roll(1, 0)], 1)


def _runs_along(value: object, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == ids.shape and not value.is_floating_point()


def _clips(model: nn.Module, inputs: Inputs, ids: Tensor) -> Iterator[Inputs]:
    """Batches in which a clip takes the place of the image: its first frame, and that of the next sample."""
    draft = InputsDraft(model, len(ids), torch.Generator())
    owners = (draft.config, draft.core, draft.text)
    named = (first(one, "video_token_id", "video_token_index", "vid_token_id") for one in owners)
    video = next((one for one in named if isinstance(one, int)), None)
    image, pixels = draft.image_token, inputs.get("pixel_values")
    if (
        video is None
        or image is None
        or VIDEO_NAMES["pixel_values"] not in draft.arguments
        or not isinstance(pixels, Tensor)
    ):
        return
    sizes = {new: inputs[old] for old, new in VIDEO_NAMES.items() if old in inputs and new in draft.arguments}
    if "video_grid_thw" in sizes:
        sizes["video_grid_thw"] = sizes["video_grid_thw"] * torch.tensor([2, 1, 1])
    others = {name: x for name, x in inputs.items() if name not in VIDEO_NAMES}
    pictures = pixels[:, 0] if pixels.dim() == 5 else pixels  # the first of several tiles shows the whole
    frames = [torch.stack([pictures, pictures.roll(1, 0)], 1)] if len(pictures) == len(ids) else []
    for clip in (*frames, _behind(pixels, len(ids))):
        given = {**sizes, VIDEO_NAMES["pixel_values"]: clip}
        count = _count_features(model, given, len(ids))
        if count:
            yield {**_in_place_of(ids == image, others, ids, video, count), **given}


def _in_place_of(places: Tensor, inputs: Inputs, ids: Tensor, video: int, count: int) -> dict[str, Any]:
    """The inputs with ``count`` tokens of a clip where those of an image stand, ``places [B, T]``."""
    start, end = int(places.nonzero()[:, 1].min()), int(places.nonzero()[:, 1].max()) + 1
    kinds = {"input_ids": video, "mm_token_type_ids": VIDEO_TYPE}
    found = {}
    for name, x in inputs.items():
        if _runs_along(x, ids):
            piece = x[:, start : start + 1].expand(-1, count)
            piece = torch.full_like(piece, kinds[name]) if name in kinds else piece
            x = torch.cat([x[:, :start], piece, x[:, end:]], 1)
        found[name] = x
    return found


def _count_features(model: nn.Module, clip: Inputs, size: int) -> int:
    """How many positions of the text one sample's clip takes; 0 if the model does not say."""
    owners = [part for part in model.modules() if hasattr(part, "get_video_features")]
    if not owners:
        return 0
    features: Any = owners[-1].get_video_features
    try:
        with torch.no_grad():
            found = features(**clip)
    except Exception:  # the model's own, for a shape that it does not take
        return 0
    found = first(found, "pooler_output", "last_hidden_state", default=found)
    parts = found if isinstance(found, list | tuple) else [found]
    count: int = sum(part.numel() // part.shape[-1] for part in parts if isinstance(part, Tensor))
    return count // size


@torch.no_grad()
def _depends_on_the_second(model: nn.Module, inputs: Inputs, size: int) -> bool:
    """Whether a model takes the inputs, and sees a change in the second half of each sample's pixels."""
    name = next((one for one in ("pixel_values", "pixel_values_videos") if one in inputs), None)
    if name is None:
        return False
    pixels: Tensor = inputs[name]
    own = pixels.unflatten(0, (size, -1)) if len(pixels) > size else pixels
    half = own.shape[1] // 2
    other = torch.cat([own[:, :half], -own[:, half:]], 1).reshape(pixels.shape)
    try:
        before, after = (model(**{**inputs, name: one}) for one in (pixels, other))
    except Exception:  # the model's own, whatever it makes of a form that it does not know
        return False
    one, two = (first(output, "logits", default=output) for output in (before, after))
    return isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape and not torch.equal(one, two)
