"""Opens the images of a data set as 8-bit RGB, and refuses what is damaged or would be guessed at. See :class:`ImageFolder`.

Orientation in EXIF data is not applied: the published models were trained and measured on pixels as they are stored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from madtp.errors import DataError
from madtp.files.images import read_image


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
