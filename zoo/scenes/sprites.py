"""Anti-aliased masks of the shapes, and the bank of background textures; both computed once a process.

:func:`sprite` returns the coverage mask of one shape, :func:`textures` and :func:`grain` the background material.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt

from zoo.scenes.objects import ANGLES, CANVAS, SHAPES

Plane = npt.NDArray[np.float32]

_SUPERSAMPLING = 6
_TEXTURES = 48
_TEXTURE_SIDE = CANVAS + 32
_TILT = np.deg2rad(16.0)


@cache
def sprite(shape: int, radius: int, angle: int) -> Plane:
    """Return coverage in [0, 1] of a shape, ``[2 * radius + 1, 2 * radius + 1]``."""
    side = 2 * radius + 1
    fine = side * _SUPERSAMPLING
    axis = ((np.arange(fine) + 0.5) / fine * side - side / 2) / (radius + 0.5)
    x, y = np.meshgrid(axis, axis)
    tilt = _TILT * (2 * angle / (ANGLES - 1) - 1)
    x, y = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    inside = _inside(SHAPES[shape], x, y)
    mask: Plane = inside.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING).mean((1, 3)).astype(np.float32)
    return mask


def _inside(shape: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Say which points (unit radius, y downwards) belong to a shape."""
    if shape == "circle":
        return x**2 + y**2 <= 0.95**2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.78
    if shape == "triangle":
        return (y <= 0.72) & (y >= 1.85 * np.abs(x) - 0.95)
    if shape == "cross":
        near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
        return (near <= 0.29) & (far <= 0.92)
    raise AssertionError(f"no rule draws the shape {shape!r}")


@lru_cache(maxsize=1)
def textures() -> Plane:
    """Return the texture bank [count, side, side], values about -1 to 1: plain, ramps, stripes, checks and clouds."""
    generator = np.random.Generator(np.random.Philox(20240617))
    axis = np.arange(_TEXTURE_SIDE, dtype=np.float64)
    x, y = np.meshgrid(axis, axis)
    bank = []
    for number in range(_TEXTURES):
        heading = generator.uniform(0, np.pi)
        along = np.cos(heading) * x + np.sin(heading) * y
        across = np.cos(heading) * y - np.sin(heading) * x
        pitch = 2 * np.pi / generator.uniform(6, 24)
        style = number % 5
        if style == 0:
            plane = 2 * (along - along.min()) / np.ptp(along) - 1
        elif style == 1:
            plane = np.sin(along * pitch)
        elif style == 2:
            plane = np.tanh(4 * np.sin(along * pitch) * np.sin(across * pitch))
        elif style == 3:
            plane = _clouds(generator)
        else:
            plane = np.sin(along * pitch + 2 * np.sin(across * pitch / 2))
        bank.append(plane)
    return np.stack(bank).astype(np.float32)


def _clouds(generator: np.random.Generator) -> npt.NDArray[np.float64]:
    coarse = 7
    grid = generator.normal(size=(coarse + 1, coarse + 1))
    place = np.linspace(0, coarse, _TEXTURE_SIDE, endpoint=False)
    cell = place.astype(int)
    part = place - cell
    part = part * part * (3 - 2 * part)
    rows = grid[cell] * (1 - part)[:, None] + grid[cell + 1] * part[:, None]
    clouds: npt.NDArray[np.float64] = rows[:, cell] * (1 - part) + rows[:, cell + 1] * part
    return clouds


@lru_cache(maxsize=1)
def grain() -> Plane:
    """Return a field of unit Gaussian noise ``[3, 4 * CANVAS, 4 * CANVAS]``, from which pictures cut their noise."""
    generator = np.random.Generator(np.random.Philox(20240618))
    return generator.standard_normal((3, 4 * CANVAS, 4 * CANVAS), dtype=np.float32)
