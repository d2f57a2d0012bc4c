"""Images in files, as 8-bit RGB; what is damaged or would be guessed at is refused. Start at :func:`read_image`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from madtp.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM")
"""Formats that are opened, whatever a file is called. Some of those that Pillow knows besides run other programs."""

MOST_PIXELS = 89_478_485
"""Pixels of the largest image: beyond this Pillow warns of images that are made to take all memory."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # tags of TIFF


def read_image(path: Path) -> Image.Image:
    """Return the pixels of an image as they are stored, in RGB: orientation in EXIF data is not applied.

    Grey values of 16 bits are scaled to 8; transparency is left out.

    Raises:
        DataError: The file is missing, damaged or of another format, or nothing says which of its values is white.
    """
    return _read(path, _in_rgb)


def read_upright(path: Path) -> Image.Image:
    """Return an image in RGB as viewers show it, turned as its EXIF data say; see :func:`read_image`."""
    return _read(path, _in_rgb_upright)


def _read(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(path, formats=_known_formats()) as image:
            return convert(image)
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}; check its path.") from error
    except _OddError as error:
        raise DataError(f"{path} {error}") from error
    except Exception as error:  # decoders raise whatever a damaged file trips over
        raise DataError(
            f"{path} is damaged or not an image in one of the formats {', '.join(FORMATS)} ({error}); copy it again."
        ) from error


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow can read; AVIF came late. Others are not even imported."""
    for name in FORMATS:
        with suppress(ImportError):
            import_module(f"PIL.{'WebP' if name == 'WEBP' else name.title()}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _OddError(Exception):
    """An image that is not damaged, and not read."""


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MOST_PIXELS:
        raise _OddError(f"has {image.width} x {image.height} pixels; an image has {MOST_PIXELS:,} at most.")
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    white = _white(image)
    if white is None:
        raise _OddError(
            f"has one number a pixel of the mode {image.mode}, and nothing says which is white; convert it to 8 bits a channel."
        )
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)).convert("RGB")


def _in_rgb_upright(image: Image.Image) -> Image.Image:
    plain = _in_rgb(image)
    if exif := image.info.get("exif"):
        plain.info["exif"] = exif
    return ImageOps.exif_transpose(plain)


def _white(image: Image.Image) -> int | None:
    """Which value of an image with wide grey values is white; None where its format does not say."""
    if image.format == "TIFF":
        tags = image.getexif()
        sixteen = image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _BLACK_IS_ZERO
        bits = tags.get(_BITS_PER_SAMPLE)
        depth = bits[0] if isinstance(bits, tuple) else bits
        return 2 ** int(depth) - 1 if sixteen and depth else None
    return 65535 if image.format in ("PNG", "PPM") and image.mode.startswith("I") else None
