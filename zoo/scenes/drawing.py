"""Draw a pair's pictures and note what each patch shows: :func:`draw_pictures`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from zoo.scenes.objects import CANVAS, Draws, Pair, Thing
from zoo.scenes.sprites import Plane, grain, sprite, textures

PATCH = 8
"""Side in pixels of the patches that annotations speak about."""

_RGB = np.array(
    [(214, 40, 40), (38, 160, 62), (46, 88, 224), (240, 206, 40), (152, 58, 190)], dtype=np.float32
)[:, :, None, None]

_LEAST_COVERAGE = 10
"""Pixels of a patch that an object must cover for the patch to bear its label."""

Labels = npt.NDArray[np.int64]


def draw_pictures(pair: Pair, draws: Draws) -> tuple[npt.NDArray[np.uint8], Labels]:
    """Draw both pictures.

    Returns:
        The pictures [2, 3, CANVAS, CANVAS] and the patch labels [2, 4, patches]: colour, shape and size of the object
        that covers most of the patch, each counted from 1 with 0 for background, and 1 where an object's centre lies.
    """
    canvas = np.empty((2, 3, CANVAS, CANVAS), dtype=np.float32)
    labels = np.zeros((2, 4, (CANVAS // PATCH) ** 2), dtype=np.int64)
    for side, things in enumerate(pair.pictures):
        _background(canvas[side], draws)
        cover = np.zeros((len(things) + 1, CANVAS, CANVAS), dtype=np.bool_)
        for number, thing in enumerate(things):
            _paint(canvas[side], cover[number + 1], thing, draws)
        _grain(canvas[side], draws)
        _label(labels[side], cover, things)
    np.clip(canvas, 0, 255, out=canvas)
    return canvas.astype(np.uint8), labels


def _background(canvas: Plane, draws: Draws) -> None:
    bank = textures()
    plane = bank[draws.below(len(bank))]
    room = plane.shape[0] - CANVAS
    x, y = draws.below(room), draws.below(room)
    level, contrast = draws.between(70, 205), draws.between(0, 20)
    tint = np.array([level + draws.between(-9, 9) for _ in range(3)], dtype=np.float32)
    np.multiply(plane[None, y : y + CANVAS, x : x + CANVAS], np.float32(contrast), out=canvas)
    canvas += tint[:, None, None]
    for _ in range(draws.below(5)):
        # Grey specks: clutter that is no coloured shape.
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


def _label(labels: Labels, cover: npt.NDArray[np.bool_], things: tuple[Thing, ...]) -> None:
    grid = CANVAS // PATCH
    area = cover.reshape(-1, grid, PATCH, grid, PATCH).sum((2, 4)).reshape(-1, grid * grid)
    area[0] = _LEAST_COVERAGE - 1
    owner = area.argmax(0)
    table = np.array([(0, 0, 0)] + [(t.colour + 1, t.shape + 1, t.size + 1) for t in things], dtype=np.int64)
    labels[:3] = table[owner].T
    for thing in things:
        labels[3, (thing.y // PATCH) * grid + thing.x // PATCH] = 1
