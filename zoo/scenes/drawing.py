"""Draw a pair's pictures and note what each patch shows: :func:`draw_pictures`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zoo.scenes.objects import CANVAS, Draws, Pair, Thing
from zoo.scenes.sprites import Plane, grain, sprite, textures

PATCH = 8
"""Side in pixels of the patches that annotations speak about."""

_RGB = np.array([(214, 40, 40), (38, 160, 62), (46, 88, 224), (240, 206, 40), (152, 58, 190)], dtype=np.float32)[
    :, :, None, None
]

_LEAST_COVERAGE = 10
"""Pixels of a patch that an object must cover for the patch to bear its label."""

GRID = CANVAS // PATCH


@dataclass(frozen=True)
class Annotation:
    """What each patch of both pictures shows, P patches in rows.

    Attributes:
        labels: ``[2, 4, P]`` int64. Colour, shape and size of the object that covers most of the patch, each counted from 1
            with 0 for background; last, 1 where an object's centre lies.
        outline: ``[2, P, PATCH * PATCH]`` bool, the pixels of the patch that objects cover.
        centre: ``[2, P, 2]`` float32, from the middle of the picture to the centre (x, y) of the patch's object, on background
            to the middle of the patch, in patch sides.
    """

    labels: npt.NDArray[np.int64]
    outline: npt.NDArray[np.bool_]
    centre: npt.NDArray[np.float32]


def draw_pictures(pair: Pair, draws: Draws) -> tuple[npt.NDArray[np.uint8], Annotation]:
    """Draw both pictures, uint8 ``[2, 3, CANVAS, CANVAS]``, and note what their patches show."""
    canvas = np.empty((2, 3, CANVAS, CANVAS), dtype=np.float32)
    patches = GRID * GRID
    annotation = Annotation(
        np.zeros((2, 4, patches), dtype=np.int64),
        np.zeros((2, patches, PATCH * PATCH), dtype=np.bool_),
        np.zeros((2, patches, 2), dtype=np.float32),
    )
    for side, things in enumerate(pair.pictures):
        _background(canvas[side], draws)
        cover = np.zeros((len(things) + 1, CANVAS, CANVAS), dtype=np.bool_)
        for number, thing in enumerate(things):
            _paint(canvas[side], cover[number + 1], thing, draws)
        _grain(canvas[side], draws)
        _annotate(annotation, side, cover, things)
    np.clip(canvas, 0, 255, out=canvas)
    return canvas.astype(np.uint8), annotation


def _background(canvas: Plane, draws: Draws) -> None:
    bank = textures()
    plane = bank[draws.below(len(bank))]
    room = plane.shape[0] - CANVAS
    x, y = draws.below(room), draws.below(room)
    level, contrast = draws.between(70, 205), draws.between(0, 20)
    tint = np.array([level + draws.between(-9, 9) for _ in range(3)], dtype=np.float32)
    np.multiply(plane[None, y : y + CANVAS, x : x + CANVAS], np.float32(contrast), out=canvas)
    canvas += tint[:, None, None]
    for _ in range(draws.below(9)):
        # Grey specks: clutter that is not a coloured shape.
        u, v = draws.below(CANVAS - 3), draws.below(CANVAS - 3)
        canvas[:, v : v + 2 + draws.below(2), u : u + 2 + draws.below(2)] = draws.between(30, 235)


def _paint(canvas: Plane, cover: npt.NDArray[np.bool_], thing: Thing, draws: Draws) -> None:
    mask = sprite(thing.shape, thing.radius, thing.angle)
    rows = slice(thing.y - thing.radius, thing.y + thing.radius + 1)
    columns = slice(thing.x - thing.radius, thing.x + thing.radius + 1)
    region = canvas[:, rows, columns]
    region += mask * (_RGB[thing.colour] * np.float32(draws.between(0.86, 1.06)) - region)
    np.greater(mask, 0.5, out=cover[rows, columns])


def _grain(canvas: Plane, draws: Draws) -> None:
    field = grain()
    room = field.shape[1] - CANVAS
    x, y = draws.below(room), draws.below(room)
    canvas += field[:, y : y + CANVAS, x : x + CANVAS] * np.float32(draws.between(2, 9))


_MIDDLES = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1).reshape(-1, 2) * PATCH + (PATCH - 1) / 2


def _annotate(annotation: Annotation, side: int, cover: npt.NDArray[np.bool_], things: tuple[Thing, ...]) -> None:
    pixels = cover.reshape(-1, GRID, PATCH, GRID, PATCH).swapaxes(2, 3).reshape(len(cover), GRID * GRID, -1)
    annotation.outline[side] = pixels.any(0)
    area = pixels.sum(2)
    area[0] = _LEAST_COVERAGE - 1
    owner = area.argmax(0)
    table = np.array([(0, 0, 0)] + [(t.colour + 1, t.shape + 1, t.size + 1) for t in things], dtype=np.int64)
    annotation.labels[side, :3] = table[owner].T
    centres = np.array([(0, 0)] + [(t.x, t.y) for t in things], dtype=np.float32)
    annotation.centre[side] = (np.where(owner[:, None] > 0, centres[owner], _MIDDLES) - (CANVAS - 1) / 2) / PATCH
    for thing in things:
        annotation.labels[side, 3, (thing.y // PATCH) * GRID + thing.x // PATCH] = 1
