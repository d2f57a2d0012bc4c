"""Find out whether a module that takes all images in one sequence computes each of them by itself.

Start at :func:`per_image_call`. Names of arguments tell nothing. An integer argument ``[images, k]`` is a table of image
sizes if the products of its rows fit the length of another argument, which holds the images one after the other, or if
another argument has one entry per row, an image that was padded. The module is then run on the images one by one, on
the first one among others, and on images of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from madtp.calls.call import Call
from madtp.calls.packed_images import Image, ImageRows, PerImageArguments, by_kind, image_results
from madtp.errors import RewriteError
from madtp.sites.preserved_state import trial_run

# Sizes of an image are a handful of numbers.
MOST_SIZES = 4


@dataclass(frozen=True)
class PerImageCall:
    """A module that computes each image by itself.

    Attributes:
        per_image: How its calls are divided into images.
        call: The call for a batch of images of one size.
    """

    per_image: PerImageArguments
    call: Call


def per_image_call(module: nn.Module, call: Call) -> PerImageCall | None:
    """How to divide ``call`` of ``module`` into images; None if it is not a call of all images in one sequence.

    Raises:
        RewriteError: It is, but images depend on each other.
    """
    per_image = _division(call)
    images = None if per_image is None else per_image.images(call)
    if per_image is None or images is None:
        return None
    with torch.no_grad():
        _check(module, call, images, per_image)
    numbers = max(by_kind(images), key=len)
    batch = [images[number] for number in numbers]
    return PerImageCall(per_image, per_image.batch(call, batch if len(batch) > 1 else batch * 2))


def _division(call: Call) -> PerImageArguments | None:
    """How a call is divided into images, by the form of its arguments alone."""
    tables = {name: value for name, value in call.kwargs.items() if _is_table(value)}
    if not tables:
        return None
    first = next(iter(tables.values()))
    tables = {name: value for name, value in tables.items() if len(value) == len(first)}
    volumes = [prod(row) for row in first.tolist()]
    others = {n: x for n, x in call.kwargs.items() if isinstance(x, Tensor) and n not in tables}
    rows = [_rows(name, x, volumes) for name, x in others.items()]
    known = [one for one in rows if one is not None]
    pictures = any(others[one.name].is_floating_point() for one in known)
    if not pictures or len(known) < len(rows) or any(isinstance(arg, Tensor) for arg in call.args):
        return None
    return PerImageArguments(tuple(tables), tuple(known), tuple(table.dtype for table in tables.values()))


def _is_table(value: object) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 2 or value.dtype not in (torch.int64, torch.int32):
        return False
    return len(value) > 1 and 1 < value.shape[1] <= MOST_SIZES and bool((value > 0).all())


def _rows(name: str, tensor: Tensor, volumes: list[int]) -> ImageRows | None:
    if not tensor.dim():
        return None
    if tensor.dim() > 1 and len(tensor) == 1:
        fitting = [dim for dim in range(1, tensor.dim()) if not tensor.shape[dim] % sum(volumes)]
        return ImageRows(name, fitting[0], tensor.shape[fitting[0]] // sum(volumes)) if fitting else None
    if len(tensor) == len(volumes):
        return ImageRows(name, 0, 0)
    return None if len(tensor) % sum(volumes) else ImageRows(name, 0, len(tensor) // sum(volumes))


def _check(module: nn.Module, call: Call, images: list[Image], per_image: PerImageArguments) -> None:
    """Run the module on the images together and one by one; then among other images, and on other sizes if it takes them."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with trial_run(module, (call.args, call.kwargs)):
            image_results(module, call, images, per_image)
            company = [images[0], *(_other(image) for image in images[1:])]
            image_results(module, per_image.join(call, company), company, per_image)
            smaller = next(_resized(module, call, images, per_image), None)
            if smaller is not None:
                image_results(module, per_image.join(call, smaller), smaller, per_image)
    finally:
        for one in training:
            one.training = True


def _other(image: Image) -> Image:
    """An image of the same size with other content."""
    return replace(image, parts=tuple(1 - 2 * x.flip(0) if x.is_floating_point() else x for x in image.parts))


def _resized(module: nn.Module, call: Call, images: list[Image], per_image: PerImageArguments) -> Iterator[list[Image]]:
    """The images, the last one half as large along one of its dimensions; as many as the module takes."""
    last = images[-1]
    for place in reversed(range(len(last.sizes[0]))):
        if last.sizes[0][place] % 2:
            continue
        sizes = tuple((*one[:place], one[place] // 2, *one[place + 1 :]) for one in last.sizes)
        parts = tuple(
            x.narrow(r.image_dim, 0, x.shape[r.image_dim] // 2) if r.per_unit else x
            for x, r in zip(last.parts, per_image.rows, strict=True)
        )
        several = [*images[:-1], Image(sizes, parts)]
        together = per_image.join(call, several)
        try:
            module(*together.args, **together.kwargs)
        except Exception:  # the module does not take an image of that size
            continue
        yield several


def why_not_per_image(module: nn.Module, error: RewriteError) -> str:
    """Why the images of a module cannot be computed one by one, in words."""
    return f"{type(module).__name__} takes all images at once, and cannot be called with one after the other: {error}"
