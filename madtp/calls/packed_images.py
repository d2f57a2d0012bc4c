"""Calls of a module that takes all images in one row, or padded to one size, as calls of one image each.

Start at :class:`PerImageArguments`. Such a module is told the size of each image by integers, one row per image, whose values
shape its computation. What it computes for one image does not depend on the others; that is checked, not assumed
(:func:`image_results`). So images of one size can run as a batch ``[B, N, C]`` like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.compare import relative_difference
from madtp.calls.structures import unflatten
from madtp.errors import RewriteError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
COARSE = 5e-2
PER_IMAGE_FORWARD = "_madtp_per_image_forward"


@dataclass(frozen=True)
class ImageRows:
    """An argument that holds all images one after the other.

    Attributes:
        name: the name of the argument.
        dim: the dimension along which images follow one another; if it is not 0, it comes behind a dimension of size 1.
        per_unit: number of entries of an image for every unit of the product of its sizes; 0 if an image is one entry.
    """

    name: str
    dim: int
    per_unit: int

    @property
    def image_dim(self) -> int:
        """The dimension of one image's tensor along which it has its entries."""
        return max(self.dim - 1, 0)


class ImageKind(NamedTuple):
    """What images have in common that run as a batch: sizes, and shapes and dtypes of their tensors."""

    sizes: tuple[tuple[int, ...], ...]
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Image:
    """One image of a call.

    Attributes:
        sizes: its sizes, by argument.
        parts: its part of each tensor, in the order of :attr:`PerImageArguments.rows`.
    """

    sizes: tuple[tuple[int, ...], ...]
    parts: tuple[Tensor, ...]

    @property
    def kind(self) -> ImageKind:
        """Images of one kind run as a batch."""
        return ImageKind(self.sizes, tuple((tuple(part.shape), part.dtype) for part in self.parts))


@dataclass(frozen=True)
class PerImageArguments:
    """Which arguments of a call hold images, and which their sizes.

    Attributes:
        sizes: names of the arguments that hold sizes, integers ``[images, k]``.
        rows: the arguments that hold images.
        dtypes: the dtypes of the arguments in ``sizes``.
    """

    sizes: tuple[str, ...]
    rows: tuple[ImageRows, ...]
    dtypes: tuple[torch.dtype, ...]

    def images(self, call: Call) -> list[Image] | None:
        """Return the images of a call; None if its arguments do not have the expected form."""
        tables: list[Tensor] = []
        for name in self.sizes:
            table = call.kwargs.get(name)
            if not isinstance(table, Tensor) or table.dim() != 2 or not len(table):
                return None
            tables.append(table)
        if len({len(table) for table in tables}) > 1:
            return None
        sizes = list(zip(*(map(tuple, table.tolist()) for table in tables), strict=True))
        volumes = [prod(first) for first, *_ in sizes]
        split: list[tuple[Tensor, ...]] = []
        for rows in self.rows:
            parts = _split(call.kwargs.get(rows.name), rows, volumes)
            if parts is None:
                return None
            split.append(parts)
        return [Image(size, parts) for size, parts in zip(sizes, zip(*split, strict=True), strict=True)]

    def join(self, call: Call, images: Sequence[Image]) -> Call:
        """Return a call of the module like ``call``, for other images."""
        changed = {name: self._table(images, at) for at, name in enumerate(self.sizes)}
        for at, rows in enumerate(self.rows):
            parts = [image.parts[at] for image in images]
            row = torch.cat(parts, rows.image_dim) if rows.per_unit else torch.stack(parts)
            changed[rows.name] = row[None] if rows.dim else row
        return replace(call, kwargs={**call.kwargs, **changed})

    def _table(self, images: Sequence[Image], at: int) -> Tensor:
        device = images[0].parts[0].device
        return torch.tensor([image.sizes[at] for image in images], dtype=self.dtypes[at], device=device)

    def batch(self, call: Call, images: Sequence[Image]) -> Call:
        """Return the call of :class:`PerImageForward` for images of one kind: tensors ``[B, ...]``, and sizes as numbers."""
        first = images[0]
        changed: dict[str, object] = dict(zip(self.sizes, first.sizes, strict=True))
        for at, rows in enumerate(self.rows):
            changed[rows.name] = torch.stack([image.parts[at] for image in images])
        return replace(call, kwargs={**call.kwargs, **changed})

    def image(self, kwargs: dict[str, Any], at: int | None) -> Image:
        """Return image ``at`` of a call of :class:`PerImageForward`; None for the only one, without a batch dimension."""
        tensors = (kwargs[rows.name] for rows in self.rows)
        return Image(tuple(kwargs[n] for n in self.sizes), tuple(x if at is None else x[at] for x in tensors))


def _split(tensor: object, rows: ImageRows, volumes: Sequence[int]) -> tuple[Tensor, ...] | None:
    """The images in a tensor; None if it does not hold as many entries as they have."""
    if not isinstance(tensor, Tensor) or tensor.dim() <= rows.dim or (rows.dim and len(tensor) != 1):
        return None
    lengths = [volume * rows.per_unit for volume in volumes] if rows.per_unit else [1] * len(volumes)
    if tensor.shape[rows.dim] != sum(lengths):
        return None
    tensor = tensor[0] if rows.dim else tensor
    return torch.split(tensor, lengths, rows.image_dim) if rows.per_unit else torch.unbind(tensor)


def by_kind(images: Sequence[Image]) -> list[list[int]]:
    """Return the numbers of the images of each kind, in the order in which kinds appear."""
    found: dict[Hashable, list[int]] = {}
    for number, image in enumerate(images):
        found.setdefault(image.kind, []).append(number)
    return list(found.values())


class PerImageForward:
    """A forward of a batch of images of one kind: it runs a module on one after the other and stacks the leaves of the results.

    Attributes:
        forward: the module's forward, which takes images in a row.
        arguments: which of its arguments hold images.
        single: it is called with one image, without a batch dimension, and stacks nothing.
    """

    def __init__(self, forward: Callable[..., object], arguments: PerImageArguments) -> None:
        self.forward, self.arguments, self.single = forward, arguments, False

    def __call__(self, *args: Any, **kwargs: Any) -> list[object]:
        if self.single:
            return self._one(args, kwargs, None)
        count = len(kwargs[self.arguments.rows[0].name])
        several = [self._one(args, kwargs, number) for number in range(count)]
        return [_stacked(same) for same in zip(*several, strict=True)]

    def _one(self, args: tuple[Any, ...], kwargs: dict[str, Any], number: int | None) -> list[object]:
        call = self.arguments.join(Call(args, kwargs), [self.arguments.image(kwargs, number)])
        return pytree.tree_leaves(self.forward(*call.args, **call.kwargs))


def _stacked(leaves: Sequence[object]) -> object:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return torch.stack(tensors) if isinstance(leaves[0], Tensor) else leaves[0]


def per_image_module(module: nn.Module, arguments: PerImageArguments | None) -> nn.Module:
    """Replace the forward of ``module``, in place, by a :class:`PerImageForward`, and return it; unchanged if that is None."""
    if arguments is None:
        return module
    per_image = PerImageForward(module.forward, arguments)

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> list[object]:
        return per_image(*args, **kwargs)

    module.__dict__["forward"], module.__dict__[PER_IMAGE_FORWARD] = forward, per_image
    return module


@contextmanager
def taking_one_image(module: nn.Module) -> Iterator[None]:
    """Let a module of :func:`per_image_module` take one image, without a batch dimension, inside the block."""
    per_image: PerImageForward = module.__dict__[PER_IMAGE_FORWARD]
    per_image.single = True
    try:
        yield
    finally:
        per_image.single = False


@dataclass(frozen=True)
class ImageResults:
    """How the results of images become the result of their call.

    Attributes:
        spec: structure of the result.
        dims: for each leaf the dimension along which those of the images follow one another; None if all images have the same.
    """

    spec: pytree.TreeSpec
    dims: tuple[int | None, ...]

    def join(self, results: Sequence[Sequence[Any]]) -> Any:
        """Return the result of a call, from the leaves of what its images return."""
        leaves = [
            same[0] if dim is None else torch.cat(list(same), dim)
            for same, dim in zip(zip(*results, strict=True), self.dims, strict=True)
        ]
        return unflatten(leaves, self.spec)


def image_results(
    forward: Callable[..., object], call: Call, images: Sequence[Image], arguments: PerImageArguments
) -> ImageResults:
    """Find out how the result of a call follows from those of its images, of which there are several.

    Args:
        forward: the forward of the module.
        call: a call with several images.
        images: the images of the call.
        arguments: which arguments hold images.

    Raises:
        RewriteError: it does not: images depend on each other, or the kind of result is not known.
    """
    leaves, spec = pytree.tree_flatten(forward(*call.args, **call.kwargs))
    results = []
    for image in images:
        one = arguments.join(call, [image])
        own, own_spec = pytree.tree_flatten(forward(*one.args, **one.kwargs))
        if own_spec != spec:
            raise RewriteError("what it returns for one image has another structure than what it returns for several.")
        results.append(own)
    joined = ImageResults(
        spec, tuple(_joined_dim(*both) for both in zip(leaves, zip(*results, strict=True), strict=True))
    )
    for position, (want, have) in enumerate(zip(leaves, pytree.tree_leaves(joined.join(results)), strict=True)):
        if isinstance(want, Tensor) and not _agree(want, have):
            raise RewriteError(f"output {position} is not that of its images one by one, so they depend on each other.")
    return joined


def _joined_dim(whole: object, parts: Sequence[Any]) -> int | None:
    """The dimension along which a leaf holds those of the images; None if it is the same for all."""
    if not isinstance(whole, Tensor):
        if any(type(part) is not type(whole) or part != whole for part in parts):
            raise RewriteError("it returns a value that is not a tensor and that differs from image to image.")
        return None
    if all(part.shape == whole.shape for part in parts):
        return None
    for dim in range(whole.dim()):
        others = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts if part.dim() == whole.dim()}
        if (
            others == {(*whole.shape[:dim], *whole.shape[dim + 1 :])}
            and sum(p.shape[dim] for p in parts) == whole.shape[dim]
        ):
            return dim
    raise RewriteError("it returns a tensor that does not hold the images one after the other.")


def _agree(want: Tensor, have: Tensor) -> bool:
    if want.shape != have.shape or want.dtype != have.dtype:
        return False
    if not (want.dtype.is_floating_point or want.is_complex()):
        return torch.equal(want, have)
    return relative_difference(want, have) <= TOLERANCE.get(want.dtype, COARSE)
