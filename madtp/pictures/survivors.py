"""What a pruned model keeps of a user's own images: :func:`show` draws it, :func:`survivors` gives it as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor

from madtp.calls.call import Call, Inputs
from madtp.errors import DataError
from madtp.files.images import read_upright
from madtp.pictures.examples import Example, KeptPatches
from madtp.pictures.figure import draw_figure
from madtp.pruned import PrunedModel
from madtp.pruned.arguments import check_pruned
from madtp.report import RewriteReport, SiteReport
from madtp.tuning.batches import as_call, evaluating

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = Union[str, Path, Tensor, "Image"]
"""An image: a file, an image of PIL, or uint8 ``[3, H, W]``."""

LAYERS, PANEL = 6, 1.5
_LONGER_SIDE = 384


def show(
    pruned: PrunedModel | Mapping[str, PrunedModel],
    images: Sequence[Picture],
    inputs: Inputs,
    path: str | Path = "kept.png",
    *,
    title: str = "What pruning keeps",
    layers: int = LAYERS,
    tower: str = "",
) -> Path:
    """Draw which patches of images survive, layer by layer.

    Args:
        pruned: The model, or several by name, of which each has a row of panels.
        images: The images as the model sees all of them: resized, but not cropped. Where a sample has several, they follow each
            other: the first and the second of the first sample, then those of the second.
        inputs: What the model is called with for these images: a dict of keyword arguments or a tuple of positional ones.
        path: File to write: PNG, or any format that matplotlib knows by its suffix.
        title: Heading of the picture.
        layers: Number of layers to draw at most, spread evenly.
        tower: Path of the module whose sites are drawn. Empty draws all sites of image towers.

    Returns:
        The path.

    Raises:
        ArgumentError: ``pruned`` is no pruned model.
        DataError: An image cannot be read, there are more or fewer than the call has, or no image tower is pruned.
        ExampleInputsError: The inputs do not fit the model.

    Example::

        inputs = processor(images=[Image.open("cat.jpg")], text=["a cat"], return_tensors="pt")
        madtp.pictures.show(pruned, ["cat.jpg"], dict(inputs), "cat-kept.png")
    """
    drawn = survivors(pruned, images, inputs, tower=tower)
    return draw_figure(drawn, Path(path), title=title, layers=max(1, layers), panel=PANEL)


def survivors(
    pruned: PrunedModel | Mapping[str, PrunedModel], images: Sequence[Picture], inputs: Inputs, *, tower: str = ""
) -> list[Example]:
    """Return what :func:`show` draws.

    Args:
        pruned: The model, or several by name.
        images: The images as the model sees all of them; those of a sample follow each other.
        inputs: What the model is called with for these images.
        tower: Path of the module whose sites are told. Empty tells all sites of image towers.

    Returns:
        An example for each sample: its images, and which patches survive each site.

    Raises:
        ArgumentError: ``pruned`` is no pruned model.
        DataError: An image cannot be read, there are more or fewer than the call has, or no image tower is pruned.
        ExampleInputsError: The inputs do not fit the model.
    """
    if not isinstance(pruned, Mapping):
        check_pruned(pruned)
        pruned = {"pruned": pruned}
    models = dict(pruned)
    if isinstance(images, (str, Path, Tensor)) or not images:
        raise DataError("images is no list of images; pass at least one, as in show(pruned, ['cat.jpg'], inputs).")
    if not models:
        raise DataError("there is no model to draw; pass a pruned model, or several by name.")
    rows: dict[str, _Masks] = {}
    for name, model in models.items():
        check_pruned(model)
        rows[name] = _masks(model, as_call(model, inputs), len(images), tower)
    each = next(iter(rows.values())).images
    height, width = _drawn_size(next(iter(rows.values())).size)
    pixels = [_pixels(image, height, width) for image in images]
    names = [_name(image, number) for number, image in enumerate(images, start=1)]
    return [
        Example(
            statement=", ".join(names[first : first + each]),
            truth=None,
            images=torch.stack(pixels[first : first + each]),
            answers=(),
            kept_patches=tuple(
                KeptPatches(name, masks.labels, tuple(kept[first // each] for kept in masks.kept), masks.grids)
                for name, masks in rows.items()
            ),
        )
        for first in range(0, len(images), each)
    ]


@dataclass(frozen=True)
class _Masks:
    """What the sites of a model keep.

    Attributes:
        images: Number of images of a sample.
        size: Height and width of an image as the model takes it; None where that cannot be told.
        labels: Of the sites.
        grids: Rows and columns of the patches at each site.
        kept: For each site, bool ``[samples, images, patches]``.
    """

    images: int
    size: tuple[int, int] | None
    labels: tuple[str, ...]
    grids: tuple[tuple[int, int], ...]
    kept: tuple[Tensor, ...]


def _masks(model: PrunedModel, call: Call, count: int, tower: str) -> _Masks:
    """Run a model on ``count`` images."""
    with torch.no_grad(), evaluating(model):
        model(*call.args, **call.kwargs)
    report, spec = model.madtp.report, model.madtp.alignment_spec
    kept = model.madtp.kept_tokens()
    sites = [site for site in _image_sites(report, tower) if site.name in kept]
    if not sites:
        raise DataError(
            "this call pruned no image tower that is asked for; `print(pruned.madtp.report)` lists the sites."
        )
    found, size = len(kept[sites[0].name]), _image_size(call)
    if found != count or count % spec.images:
        several = "" if spec.images == 1 else f", {spec.images} for each sample"
        raise DataError(
            f"the call has {found} images{several}, and {count} are to be drawn; pass the images of the call."
        )
    masks, grids = [], []
    for site in sites:
        patches = _patches(report, site, kept[site.name].cpu())
        grids.append(_grid(site, patches.shape[1], size))
        blocked = spec.images > 1 and spec.image_order == "blocked"
        shape = (spec.images, -1) if blocked else (-1, spec.images)
        shaped = patches.reshape(*shape, patches.shape[1])
        masks.append(shaped.transpose(0, 1) if blocked else shaped)
    labels = tuple(f"layer {site.layer}" for site in sites)
    return _Masks(spec.images, size, labels, tuple(grids), tuple(masks))


def _image_sites(report: RewriteReport, tower: str) -> list[SiteReport]:
    sites = [site for site in report.sites if site.modality == "image"]
    chosen = [site for site in sites if not tower or site.name == tower or site.name.startswith(f"{tower}.")]
    if not chosen:
        have = ", ".join(dict.fromkeys(site.name for site in sites[:4])) or "none"
        where = f"no site in {tower!r}" if tower else "no site in an image tower of its own"
        raise DataError(f"{report.model} has {where}, so there is nothing to draw; sites of image towers: {have}.")
    return chosen


def _patches(report: RewriteReport, site: SiteReport, kept: Tensor) -> Tensor:
    """The columns of patches ``[rows, patches]``, without learned tokens such as the class token."""
    path = site.name.partition("#")[0]
    streams = {block.stream for block in report.blocks if block.path == path and block.kind == "self"}
    special = {p % kept.shape[1] for s in report.streams if s.index in streams for p in s.special if p < kept.shape[1]}
    return kept[:, [position for position in range(kept.shape[1]) if position not in special]]


def _grid(site: SiteReport, patches: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns, in the shape of the image."""
    aspect = 1.0 if size is None else size[0] / size[1]
    rows = round((patches * aspect) ** 0.5)
    if rows == 0 or patches % rows:
        raise DataError(
            f"the {patches} patches at {site.name} are no grid in the shape of the image, so they cannot be drawn."
        )
    return rows, patches // rows


def _image_size(call: Call) -> tuple[int, int] | None:
    sizes = [t.shape[-2:] for t in call.tensors() if t.is_floating_point() and t.dim() >= 4 and t.shape[-3] in (1, 3)]
    return (int(sizes[0][0]), int(sizes[0][1])) if sizes else None


def _drawn_size(size: tuple[int, int] | None) -> tuple[int, int]:
    height, width = size or (1, 1)
    scale = _LONGER_SIDE / max(height, width)
    return max(1, round(scale * height)), max(1, round(scale * width))


def _pixels(image: Picture, height: int, width: int) -> Tensor:
    """An image as uint8 ``[3, height, width]``."""
    from PIL import Image

    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            raise DataError(
                f"an image is a {image.dtype} tensor of shape {tuple(image.shape)}; pass uint8 [3, H, W], an image of "
                "PIL or a path."
            )
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    elif isinstance(image, (str, Path)):
        image = read_upright(Path(image))
    elif not isinstance(image, Image.Image):
        raise DataError(f"an image is a {type(image).__name__}; pass a path, an image of PIL or uint8 [3, H, W].")
    small = image.width < width and image.height < height  # the pixels of small images are to be seen
    how = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    return torch.from_numpy(np.array(image.convert("RGB").resize((width, height), how))).permute(2, 0, 1)


def _name(image: Picture, number: int) -> str:
    return Path(image).name if isinstance(image, (str, Path)) else f"image {number}"
