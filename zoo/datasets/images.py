"""Opens the images of a data set as 8-bit RGB, and refuses what is damaged or would be guessed at. See :class:`ImageFolder`.

Orientation in EXIF data is not applied: the published models were trained and measured on pixels as they are stored.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from madtp.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM")
"""Formats that are opened, whatever a file is called. Some of those that Pillow knows besides run other programs."""

MOST_PIXELS = 89_478_485
"""Pixels of the largest image: beyond this Pillow warns of images that are made to take all memory."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # tags of TIFF


@dataclass(frozen=True)
class ImageFolder:
    """Opens images below a folder, or below one of its folders of the given names."""

    root: Path
    below: tuple[str, ...] = (".", "images")

    def path(self, name: str) -> Path:
        """The file of an image.

        Raises:
            DataError: There is no such file, or it lies outside the folder.
        """
        relative = Path(name)
        if relative.is_absolute() or relative.drive or ".." in relative.parts:
            raise DataError(f"the image {name!r} lies outside {self.root}; names of images are relative to it.")
        tried = [self.root / folder / name for folder in self.below]
        # Path.is_file() raises where a name is too long.
        path = next((path for path in tried if os.path.isfile(path)), None)
        if path is None:
            raise DataError(
                f"there is no image {' or '.join(map(str, tried))}; the images of the data set are not complete."
            )
        return path

    def __call__(self, name: str) -> Image.Image:
        """The image in RGB. Grey values of 16 bits are scaled to 8; transparency and EXIF data are left out.

        Raises:
            DataError: There is no such file, it lies outside the folder, it is damaged or of another format, or nothing says
                which of its values is white.
        """
        return read_image(self.path(name))


def read_image(path: Path) -> Image.Image:
    """Return the image in a file, in RGB, as :class:`ImageFolder` does."""
    try:
        with Image.open(path, formats=_known_formats()) as image:
            return _in_rgb(image)
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


def _white(image: Image.Image) -> int | None:
    """Which value of an image with wide grey values is white; None where its format does not say."""
    if image.format == "TIFF":
        tags = image.getexif()
        sixteen = image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _BLACK_IS_ZERO
        bits = tags.get(_BITS_PER_SAMPLE)
        depth = bits[0] if isinstance(bits, tuple) else bits
        return 2 ** int(depth) - 1 if sixteen and depth else None
    return 65535 if image.format in ("PNG", "PPM") and image.mode.startswith("I") else None
