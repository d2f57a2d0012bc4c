"""Images apart: find out whether a module that takes all images in one row computes each of them by itself.

Start at :func:`apart_of`. Nothing is taken from names: an integer argument ``[images, k]`` whose products of a row fit
the length of a tensor tells the sizes of images that stand in one row; beside one with as many entries as it has rows,
those of images that were padded. The module is then run on the images one by one, on others in their company, and on images
of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from madtp.calls.call import Call
from madtp.calls.compare import drawing_alike
from madtp.calls.per_image import Image, ImageRows, PerImageArguments, by_kind, image_results
from madtp.errors import RewriteError

# Sizes of an image are a handful of numbers.
MOST_SIZES = 4


@dataclass(frozen=True)
class Found:
    """A module whose images are computed apart, and the call for a batch of them."""

    apart: PerImageArguments
    call: Call


def apart_of(module: nn.Module, call: Call) -> Found | None:
    """How to take ``call`` of ``module`` apart; None if it is not of that form.

    Raises:
        RewriteError: it is, but images depend on each other.
    """
    apart = _form(call)
    images = None if apart is None else apart.images(call)
    if apart is None or images is None:
        return None
    with torch.no_grad():
        _check(module, call, images, apart)
    numbers = max(by_kind(images), key=len)
    batch = [images[number] for number in numbers]
    return Found(apart, apart.batch(call, batch if len(batch) > 1 else batch * 2))


def _form(call: Call) -> PerImageArguments | None:
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


def _is_table(value: Any) -> bool:
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


def _check(module: nn.Module, call: Call, images: list[Image], apart: PerImageArguments) -> None:
    """Run the module on the images together and apart; then in other company, and in other sizes where it takes them."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with drawing_alike():
            image_results(module, call, images, apart)
            company = [images[0], *(_other(image) for image in images[1:])]
            image_results(module, apart.join(call, company), company, apart)
            smaller = next(_resized(module, call, images, apart), None)
            if smaller is not None:
                image_results(module, apart.join(call, smaller), smaller, apart)
    finally:
        for one in training:
            one.training = True


def _other(image: Image) -> Image:
    """An image of the same size that shows something else."""
    return replace(image, parts=tuple(1 - 2 * x.flip(0) if x.is_floating_point() else x for x in image.parts))


def _resized(module: nn.Module, call: Call, images: list[Image], apart: PerImageArguments) -> Iterator[list[Image]]:
    """The images with the last one half as large along one of its dimensions, where the module takes that."""
    last = images[-1]
    for place in reversed(range(len(last.sizes[0]))):
        if last.sizes[0][place] % 2:
            continue
        sizes = tuple((*one[:place], one[place] // 2, *one[place + 1 :]) for one in last.sizes)
        parts = tuple(
            x.narrow(r.image_dim, 0, x.shape[r.image_dim] // 2) if r.per_unit else x
            for x, r in zip(last.parts, apart.rows, strict=True)
        )
        several = [*images[:-1], Image(sizes, parts)]
        together = apart.join(call, several)
        try:
            module(*together.args, **together.kwargs)
        except Exception:  # the module does not take an image of that size
            continue
        yield several


def refusal(module: nn.Module, error: RewriteError) -> str:
    """Why a module cannot be taken apart, in words."""
    return f"{type(module).__name__} takes all images at once, and cannot be called with one after the other: {error}"
