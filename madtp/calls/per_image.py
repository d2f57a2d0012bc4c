"""Images apart: calls of a module that takes all images in one row, or padded to one size, as calls of one image each.

Start at :class:`Apart`. Such a module is told the size of each image by integers, one row an image, whose values shape its
computation. What it computes for one image does not depend on the others; that is checked, not assumed (:func:`recipe_of`).
So images of one size can run as a batch ``[B, N, C]`` like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.compare import relative_difference
from madtp.calls.structures import unflatten
from madtp.errors import RewriteError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
COARSE = 5e-2
EACH = "_madtp_each_image"


@dataclass(frozen=True)
class Rows:
    """An argument that holds all images one after the other along ``dim``; behind a dimension of size 1 where that is not 0.
    each: entries of an image for every unit of the product of its sizes; 0: an image is one entry."""

    name: str
    dim: int
    each: int

    @property
    def place(self) -> int:
        """The dimension along which an image has its entries."""
        return max(self.dim - 1, 0)


@dataclass(frozen=True)
class Image:
    """One image of a call: its sizes, by argument, and its part of the tensors, in the order of :attr:`Apart.rows`."""

    sizes: tuple[tuple[int, ...], ...]
    parts: tuple[Tensor, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Images of one kind run as a batch."""
        return self.sizes, tuple((tuple(part.shape), part.dtype) for part in self.parts)


@dataclass(frozen=True)
class Apart:
    """Which arguments of a call, by name, hold the sizes of images (``[images, k]``, integers) and which the images."""

    sizes: tuple[str, ...]
    rows: tuple[Rows, ...]
    dtypes: tuple[torch.dtype, ...]

    def images(self, call: Call) -> list[Image] | None:
        """The images of a call; None if it is of another form."""
        tables = [call.kwargs.get(name) for name in self.sizes]
        if not all(isinstance(table, Tensor) and table.dim() == 2 and len(table) for table in tables):
            return None
        sizes = list(zip(*(map(tuple, table.tolist()) for table in tables), strict=True))  # type: ignore[union-attr]
        split = [_split(call.kwargs.get(rows.name), rows, [prod(one[0]) for one in sizes]) for rows in self.rows]
        if any(parts is None for parts in split) or any(len(table) != len(sizes) for table in tables):  # type: ignore[arg-type]
            return None
        return [Image(one, parts) for one, parts in zip(sizes, zip(*split, strict=True), strict=True)]  # type: ignore[arg-type]

    def together(self, call: Call, images: Sequence[Image]) -> Call:
        """A call like ``call`` of the module for other images."""
        changed = {name: self._table(images, at) for at, name in enumerate(self.sizes)}
        for at, rows in enumerate(self.rows):
            parts = [image.parts[at] for image in images]
            row = torch.cat(parts, rows.place) if rows.each else torch.stack(parts)
            changed[rows.name] = row[None] if rows.dim else row
        return replace(call, kwargs={**call.kwargs, **changed})

    def _table(self, images: Sequence[Image], at: int) -> Tensor:
        device = images[0].parts[0].device
        return torch.tensor([image.sizes[at] for image in images], dtype=self.dtypes[at], device=device)

    def batch(self, call: Call, images: Sequence[Image]) -> Call:
        """The call of :class:`EachImage` for images of one kind: tensors ``[B, ...]``, sizes as numbers."""
        first = images[0]
        changed: dict[str, Any] = dict(zip(self.sizes, first.sizes, strict=True))
        for at, rows in enumerate(self.rows):
            changed[rows.name] = torch.stack([image.parts[at] for image in images])
        return replace(call, kwargs={**call.kwargs, **changed})

    def image(self, kwargs: dict[str, Any], at: int | None) -> Image:
        """Image ``at`` of a call of :class:`EachImage`; None: the only one, which has no batch dimension."""
        tensors = (kwargs[rows.name] for rows in self.rows)
        return Image(tuple(kwargs[n] for n in self.sizes), tuple(x if at is None else x[at] for x in tensors))


def _split(tensor: Any, rows: Rows, volumes: Sequence[int]) -> tuple[Tensor, ...] | None:
    """The images in a tensor; None if it does not hold as many entries as they have."""
    if not isinstance(tensor, Tensor) or tensor.dim() <= rows.dim or (rows.dim and len(tensor) != 1):
        return None
    lengths = [volume * rows.each for volume in volumes] if rows.each else [1] * len(volumes)
    if tensor.shape[rows.dim] != sum(lengths):
        return None
    tensor = tensor[0] if rows.dim else tensor
    return tensor.split(lengths, rows.place) if rows.each else tensor.unbind()


def by_kind(images: Sequence[Image]) -> list[list[int]]:
    """Numbers of the images of each kind, in the order in which kinds appear."""
    found: dict[Any, list[int]] = {}
    for number, image in enumerate(images):
        found.setdefault(image.kind, []).append(number)
    return list(found.values())


class EachImage:
    """Stands for the forward of a module: called with a batch of images of one kind, it runs the module on one after the other
    and returns the leaves of what it returns, stacked.

    single: it is called with one image, without a batch dimension, and stacks nothing.
    """

    def __init__(self, forward: Callable[..., Any], apart: Apart) -> None:
        self.forward, self.apart, self.single = forward, apart, False

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        if self.single:
            return self._one(args, kwargs, None)
        count = len(kwargs[self.apart.rows[0].name])
        several = [self._one(args, kwargs, number) for number in range(count)]
        return [torch.stack(same) if isinstance(same[0], Tensor) else same[0] for same in zip(*several, strict=True)]

    def _one(self, args: tuple[Any, ...], kwargs: dict[str, Any], number: int | None) -> list[Any]:
        call = self.apart.together(Call(args, kwargs), [self.apart.image(kwargs, number)])
        return pytree.tree_leaves(self.forward(*call.args, **call.kwargs))


def each_image(module: nn.Module, apart: Apart | None) -> nn.Module:
    """``module``, whose forward is replaced in place by that of a batch of images; as it is if ``apart`` is None."""
    if apart is None:
        return module
    each = EachImage(module.forward, apart)

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return each(*args, **kwargs)

    module.__dict__["forward"], module.__dict__[EACH] = forward, each
    return module


@contextmanager
def computing_one(module: nn.Module) -> Iterator[None]:
    """Inside the block a module of :func:`each_image` takes one image, without a batch dimension."""
    each: EachImage = module.__dict__[EACH]
    each.single = True
    try:
        yield
    finally:
        each.single = False


@dataclass(frozen=True)
class Recipe:
    """How the results of images become the result of their call. joined: by leaf, the dimension along which those of the images
    stand one after the other; None where all have the same."""

    spec: pytree.TreeSpec
    joined: tuple[int | None, ...]

    def join(self, results: Sequence[Sequence[Any]]) -> Any:
        """The result of a call, from the leaves of what its images return."""
        leaves = [
            same[0] if dim is None else torch.cat(list(same), dim)
            for same, dim in zip(zip(*results, strict=True), self.joined, strict=True)
        ]
        return unflatten(leaves, self.spec)


def recipe_of(forward: Callable[..., Any], call: Call, images: Sequence[Image], apart: Apart) -> Recipe:
    """How the results of a call come from those of its images, of which there are several.

    Raises:
        RewriteError: they do not: images depend on each other, or results are of a kind that is not known.
    """
    leaves, spec = pytree.tree_flatten(forward(*call.args, **call.kwargs))
    results = []
    for image in images:
        one = apart.together(call, [image])
        own, own_spec = pytree.tree_flatten(forward(*one.args, **one.kwargs))
        if own_spec != spec:
            raise RewriteError("what it returns for one image has another structure than what it returns for several.")
        results.append(own)
    recipe = Recipe(spec, tuple(_joined(*both) for both in zip(leaves, zip(*results, strict=True), strict=True)))
    for position, (want, have) in enumerate(zip(leaves, pytree.tree_leaves(recipe.join(results)), strict=True)):
        if isinstance(want, Tensor) and not _agree(want, have):
            raise RewriteError(f"output {position} is not that of its images one by one, so they depend on each other.")
    return recipe


def _joined(whole: Any, parts: Sequence[Any]) -> int | None:
    if not isinstance(whole, Tensor):
        if any(type(part) is not type(whole) or part != whole for part in parts):
            raise RewriteError("it returns a value that is no tensor and that differs from image to image.")
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
